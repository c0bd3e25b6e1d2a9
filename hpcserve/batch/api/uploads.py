"""Taking in a file: from a form to the disk, in bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path, PurePath

from ...http.errors import HttpError
from ...http.exchange import Exchange
from .. import disk
from .form import Form
from .records import FileRecord, new_id
from .store import Store

_FORM = 64 * 1024
"""Bytes of a form besides its file."""


async def receive(exchange: Exchange, store: Store, owner: str, limit: int) -> FileRecord:
    """The file of `POST /v1/files`, of at most `limit` bytes. Raises HttpError, ClientGone, StorageError."""
    kind = exchange.header(b"content-type") or b""
    form = Form(kind, exchange.pieces(limit + _FORM))
    fields: dict[str, str] = {}
    record: FileRecord | None = None
    name = new_id("file-")
    path = store.dir.files / f"{name}.jsonl"
    kept = False
    try:
        async for part in form.parts():
            if part.name != "file":
                fields[part.name] = await form.text()
            elif record is not None:
                raise HttpError(400, "the form field `file` is there twice")
            else:
                size = await _write(form, path, limit)
                record = FileRecord(
                    id=name, number=0, owner=owner, created_at=int(time.time()),
                    filename=PurePath(part.filename or "").name[:255] or f"{name}.jsonl", bytes=size,
                    purpose="batch", path=str(path.relative_to(store.dir.root)),
                )  # fmt: skip
        if record is None:
            raise HttpError(400, "the form field `file` is missing")
        _check(fields)
        record.number = store.number()
        await store.save(record)
        kept = True
        return record
    except HttpError as error:
        if error.status == 413:
            raise HttpError(413, f"the file is larger than {limit} bytes") from None
        raise
    finally:
        if not kept:
            with contextlib.suppress(OSError):  # the next process's sweep takes it
                path.unlink(missing_ok=True)


def _check(fields: dict[str, str]) -> None:
    purpose = fields.pop("purpose", None)
    if purpose != "batch":
        said = "is missing" if purpose is None else f"is {purpose[:40]!r}"
        raise HttpError(400, f"`purpose` {said}; files are taken here for `batch` only")
    if fields:
        # `expires_after[…]` would be ignored: files are there as long as the run's directory.
        raise HttpError(400, f"unknown form fields: {', '.join(sorted(fields))[:200]}")


async def _write(form: Form, path: Path, limit: int) -> int:
    """The part's content to a new file, on the disk when this returns; its size."""
    handle = await asyncio.to_thread(disk.create, path)
    assert handle is not None, "nobody guesses its name"
    size = 0
    try:
        async for piece in form.data():
            size += len(piece)
            if size > limit:
                raise HttpError(413, f"the file is larger than {limit} bytes")
            # In a thread: a shared file system may take its time.
            await asyncio.to_thread(disk.append, handle, piece, path)
        await asyncio.to_thread(disk.sync, handle, path)
    finally:
        os.close(handle)
    return size
