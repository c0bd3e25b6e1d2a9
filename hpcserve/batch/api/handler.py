"""The routes of the Batch API, for the router alone: it has looked at the client's key and says whose it is.

`/v1/files`    POST, GET; `/{id}` GET, DELETE; `/{id}/content` GET
`/v1/batches`  POST, GET; `/{id}` GET; `/{id}/cancel` POST

See https://platform.openai.com/docs/api-reference/batch and …/files. What is not there, or somebody else's,
is a 404: nobody learns which ids exist.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import parse_qs

import msgspec

from ...errors import HpcserveError
from ...http.errors import HttpError
from ...http.exchange import Exchange
from ...rundir.atomic import read_json
from ..prompt_text import PROMPTS
from .carrier import Carrier, end_time
from .records import BatchRecord, FileRecord, new_id
from .store import Store, page
from .uploads import receive

log = logging.getLogger(__name__)

MAX_FILE = 2 << 30
"""Bytes of an uploaded file, unless told otherwise. OpenAI's limit is 200 MB; rows have none here."""
_BODY = 256 * 1024
_PIECE = 1 << 20
_METADATA = (16, 64, 512)
"""Pairs, and characters of a key and of a value."""
R = TypeVar("R", FileRecord, BatchRecord)


class Asking(NamedTuple):
    """Who asks, in the router's words."""

    user: str | None
    """Name of the key; None: the run's own key, or an endpoint without keys, which see everything."""
    key: str
    """Its id; "" as above."""

    def may_see(self, record: FileRecord | BatchRecord) -> bool:
        return self.user is None or record.owner == self.user


class _NewBatch(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of `POST /v1/batches`."""

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = None


class Handler:
    def __init__(
        self, store: Store, carrier: Carrier, *, token: str, endpoint: Path, max_file: int = MAX_FILE
    ) -> None:
        """`token` is what the router must say; `endpoint` the run's endpoint.json."""
        self._store = store
        self._carrier = carrier
        self._token = b"Bearer " + token.encode("ascii")
        self._endpoint = endpoint
        self._max_file = max_file

    async def handle(self, exchange: Exchange) -> None:
        """Raises HttpError."""
        given = exchange.header(b"authorization") or b""
        if not hmac.compare_digest(given, self._token):
            raise HttpError(401, "this is for the run's router", code="invalid_api_key")
        user = exchange.header(b"x-hpcserve-user")
        key = (exchange.header(b"x-hpcserve-key") or b"").decode("ascii", "replace")
        asking = Asking(None if user is None else user.decode("ascii", "replace"), key)
        try:
            await self._answer(exchange, asking)
        except HpcserveError as error:
            log.error("%s %s: %s (%s)", exchange.method, exchange.path, error.message, error.hint)
            raise HttpError(500, "the Batch API can't write in the run directory", code="storage") from error

    async def _answer(self, exchange: Exchange, asking: Asking) -> None:
        _, _, kind, *rest = exchange.path.split("/")
        # The router lets no other methods through.
        method = "GET" if exchange.method == "HEAD" else exchange.method
        match method, kind, rest:
            case "POST", "files", []:
                _reply(exchange, (await self._upload(exchange, asking)).shown())
            case "GET", "files", []:
                _reply(exchange, self._list_files(exchange, asking))
            case "GET", "files", [name]:
                _reply(exchange, self._file(name, asking).shown())
            case "GET", "files", [name, "content"]:
                await self._content(exchange, self._file(name, asking))
            case "DELETE", "files", [name]:
                _reply(exchange, await self._delete(self._file(name, asking)))
            case "POST", "batches", []:
                _reply(exchange, self._shown(await self._create(exchange, asking)))
            case "GET", "batches", []:
                _reply(exchange, self._list_batches(exchange, asking))
            case "GET", "batches", [name]:
                _reply(exchange, self._shown(self._batch(name, asking)))
            case "POST", "batches", [name, "cancel"]:
                _reply(exchange, self._shown(await self._cancel(self._batch(name, asking))))
            case _:
                raise HttpError(404, f"no such route: {exchange.path[:200]}", code="unknown_route")

    # Files

    def _file(self, name: str, asking: Asking) -> FileRecord:
        found = self._store.files.get(name)
        if found is None or not asking.may_see(found):
            raise HttpError(404, f"no such file: {name[:100]}", code="not_found")
        return found

    async def _upload(self, exchange: Exchange, asking: Asking) -> FileRecord:
        return await receive(exchange, self._store, asking.user or "", self._max_file)

    def _list_files(self, exchange: Exchange, asking: Asking) -> dict[str, Any]:
        asked = _Query(exchange, {"after", "limit", "order", "purpose"})
        seen = [file for file in self._store.files.values() if asking.may_see(file)]
        purpose = asked.text("purpose")
        if purpose is not None:
            seen = [file for file in seen if file.purpose == purpose]
        order = asked.text("order") or "desc"
        if order not in ("asc", "desc"):
            raise HttpError(400, "`order` must be asc or desc")
        limit = asked.limit(default=10_000, most=10_000)
        found, more = asked.page(seen, limit, newest_first=order == "desc")
        return _list([file.shown() for file in found], more)

    async def _content(self, exchange: Exchange, file: FileRecord) -> None:
        """Piece by piece, as fast as the client reads."""
        try:
            content = await asyncio.to_thread(self._store.content(file).open, "rb")
        except FileNotFoundError:
            raise HttpError(404, f"the content of {file.id} is not there any more") from None
        except OSError as error:
            raise HttpError(500, f"can't read {file.id}: {error.strerror}", code="storage") from error
        with content:
            exchange.start(200, [(b"content-type", b"application/octet-stream")], length=file.bytes)
            left = file.bytes if exchange.method != "HEAD" else 0
            while left and not exchange.gone:
                piece = await asyncio.to_thread(content.read, min(_PIECE, left))
                if not piece:
                    break
                left -= len(piece)
                exchange.write(piece)
                await exchange.drain()
        exchange.finish()

    async def _delete(self, file: FileRecord) -> dict[str, Any]:
        batch = self._store.needed(file.id)
        if batch is not None:
            raise HttpError(400, f"{file.id} is the input of {batch.id}, which is not over: cancel it first")
        await self._store.remove(file)
        return {"id": file.id, "object": "file", "deleted": True}

    # Batches

    def _batch(self, name: str, asking: Asking) -> BatchRecord:
        found = self._store.batches.get(name)
        if found is None or not asking.may_see(found):
            raise HttpError(404, f"no such batch: {name[:100]}", code="not_found")
        return found

    def _shown(self, batch: BatchRecord) -> dict[str, Any]:
        return batch.shown(self._carrier.counts(batch))

    async def _create(self, exchange: Exchange, asking: Asking) -> BatchRecord:
        try:
            asked = msgspec.json.decode(await exchange.body(_BODY), type=_NewBatch)
        except msgspec.ValidationError as error:
            raise HttpError(400, f"the request body is no batch: {error}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise HttpError(400, f"the request body is not valid JSON: {error}") from None
        _check_metadata(asked.metadata)
        if asked.endpoint not in PROMPTS:
            raise HttpError(
                400, f"`endpoint` must be one of {', '.join(PROMPTS)}, not {asked.endpoint[:100]!r}"
            )
        file = self._file(asked.input_file_id, asking)
        if file.purpose != "batch":
            raise HttpError(400, f"{file.id} is of the purpose {file.purpose}, and must be of `batch`")
        batch = BatchRecord(
            id=new_id("batch_"), number=self._store.number(), owner=asking.user or "", key=asking.key,
            endpoint=asked.endpoint, input_file_id=file.id, completion_window=asked.completion_window,
            created_at=int(time.time()), metadata=asked.metadata, expires_at=await self._end_time(),
        )  # fmt: skip
        await self._store.save(batch)
        self._carrier.take(batch)
        return batch

    async def _end_time(self) -> int | None:
        try:
            return end_time(await asyncio.to_thread(read_json, self._endpoint))
        except FileNotFoundError:
            return None

    def _list_batches(self, exchange: Exchange, asking: Asking) -> dict[str, Any]:
        asked = _Query(exchange, {"after", "limit"})
        seen = [batch for batch in self._store.batches.values() if asking.may_see(batch)]
        found, more = asked.page(seen, asked.limit(default=20, most=100))
        return _list([self._shown(batch) for batch in found], more)

    async def _cancel(self, batch: BatchRecord) -> BatchRecord:
        if batch.status in ("validating", "in_progress"):
            await self._carrier.cancel(batch)
        elif batch.status != "cancelling":
            raise HttpError(400, f"{batch.id} is {batch.status}, and can't be cancelled any more")
        return batch


class _Query:
    """What stands behind the question mark."""

    def __init__(self, exchange: Exchange, known: set[str]) -> None:
        self._asked = parse_qs(exchange.query, keep_blank_values=True)
        unknown = self._asked.keys() - known
        if unknown:
            raise HttpError(400, f"unknown parameters: {', '.join(sorted(unknown))[:200]}")

    def text(self, name: str) -> str | None:
        return self._asked.get(name, [None])[-1]

    def limit(self, *, default: int, most: int) -> int:
        text = self.text("limit")
        if text is None:
            return default
        if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= most:
            raise HttpError(400, f"`limit` must be a whole number from 1 to {most}, not {text[:20]!r}")
        return int(text)

    def page(self, records: Iterable[R], limit: int, *, newest_first: bool = True) -> tuple[list[R], bool]:
        after = self.text("after")
        try:
            return page(records, after=after, limit=limit, newest_first=newest_first)
        except KeyError:
            raise HttpError(
                404, f"`after`: there is no {str(after)[:100]!r} here", code="not_found"
            ) from None


def _check_metadata(metadata: dict[str, str] | None) -> None:
    pairs, key_most, value_most = _METADATA
    for key, value in (metadata or {}).items():
        if len(key) > key_most or len(value) > value_most:
            raise HttpError(
                400, f"`metadata`: keys have up to {key_most} characters, and values up to {value_most}"
            )
    if metadata is not None and len(metadata) > pairs:
        raise HttpError(400, f"`metadata` has up to {pairs} pairs, not {len(metadata)}")


def _list(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": more,
    }


def _reply(exchange: Exchange, told: dict[str, Any]) -> None:
    exchange.respond(200, json.dumps(told).encode())
