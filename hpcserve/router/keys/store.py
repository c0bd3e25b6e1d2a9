"""Keys at rest: one file per key in a directory that outlives runs.

A key is `hps-ID-SECRET`: ID is public and names the file, SECRET is 256 random bits. The file holds the
SHA-256 of the whole key. A slow hash would add nothing: it guards secrets that people choose, and nobody
searches 2**256 of them, however quick one try is. So a request costs a microsecond, not a tenth of a second.

One file per key, because no lock holds on every shared file system: two login nodes that make keys at one
time write two files of different names, each of them whole (`rundir/atomic.py`). A revoked key's file stays,
marked, so that a report can still say whose it was.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from ...errors import HpcserveError, RunError, StorageError
from ...rundir.atomic import storage_error, write_text
from .identity import PRIORITIES, Identity, Limits

PREFIX = "hps-"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
RESERVED = frozenset({"run", "idle"})
_ID = re.compile(r"[0-9a-hjkmnp-tv-z]{10}")
_ID_LETTERS = "0123456789abcdefghjkmnpqrstvwxyz"
_SUFFIX = ".json"
_Count = Annotated[int, msgspec.Meta(ge=1)]


class KeyRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One file. Times are Unix seconds."""

    id: Annotated[str, msgspec.Meta(pattern=f"^{_ID.pattern}$")]
    name: Annotated[str, msgspec.Meta(pattern=f"^{NAME.pattern}$")]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    created: float
    created_by: str
    revoked: float | None = None
    concurrent: _Count | None = None
    tokens_per_minute: _Count | None = None
    tokens: _Count | None = None
    models: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] | None = None
    priority: Literal["interactive", "batch"] = "interactive"
    weight: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 1.0

    def identity(self) -> Identity:
        return Identity(
            key=self.id,
            name=self.name,
            priority=PRIORITIES[self.priority],
            weight=self.weight,
            limits=Limits(
                concurrent=self.concurrent,
                tokens_per_minute=self.tokens_per_minute,
                tokens_total=self.tokens,
                models=None if self.models is None else frozenset(self.models),
            ),
        )


_decoder = msgspec.json.Decoder(KeyRecord)


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def id_of(key: bytes) -> str:
    """The public part of a key of ours; "" when it is not one."""
    if not key.startswith(b"hps-") or key[14:15] != b"-":
        return ""
    return key[4:14].decode("ascii", "replace")


class KeyStore:
    """The directory of keys."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def create(self, name: str, *, created_by: str, **fields: object) -> tuple[KeyRecord, str]:
        """Make a key; `fields` are limits and class of KeyRecord. Returns what is stored, and the key itself.

        Nobody can read the key from the directory afterwards. Raises StorageError.
        """
        key_id = "".join(secrets.choice(_ID_LETTERS) for _ in range(10))
        key = f"{PREFIX}{key_id}-{secrets.token_urlsafe(32)}"
        values = {
            "id": key_id,
            "name": name,
            "sha256": digest(key.encode()).hex(),
            "created": round(time.time(), 3),
            "created_by": created_by,
            **fields,
        }
        record = msgspec.convert(values, KeyRecord)
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, "make the directory of keys") from error
        self._write(record)
        return record, key

    def revoke(self, text: str) -> list[KeyRecord]:
        """Mark the key of this id, or every key of this name. Raises RunError, StorageError."""
        records, _ = self.read()
        found = [record for record in records.values() if text in (record.id, record.name)]
        if not found:
            raise RunError(
                f"no key in {self.directory} has the id or the name {text!r}",
                hint="`hpcserve key list` shows them",
            )
        now = round(time.time(), 3)
        revoked = [msgspec.structs.replace(record, revoked=now) for record in found if record.revoked is None]
        for record in revoked:
            self._write(record)
        return revoked

    def _write(self, record: KeyRecord) -> None:
        text = msgspec.json.format(msgspec.json.encode(record), indent=1).decode()
        write_text(self.directory / f"{record.id}{_SUFFIX}", text + "\n")

    def read(self) -> tuple[dict[str, KeyRecord], dict[str, HpcserveError]]:
        """All keys by id, and what is wrong with files that can't be read, by id.

        No directory is no keys. Raises StorageError when it can't be listed.
        """
        records: dict[str, KeyRecord] = {}
        errors: dict[str, HpcserveError] = {}
        for name in self.versions():
            try:
                records[name] = self.record(name)
            except FileNotFoundError:
                continue
            except StorageError as error:
                errors[name] = error
        return records, errors

    def versions(self) -> Mapping[str, tuple[int, int, int]]:
        """What tells that a key's file was written again, by id. Raises StorageError."""
        found: dict[str, tuple[int, int, int]] = {}
        try:
            with os.scandir(self.directory) as entries:
                for entry in entries:
                    key_id = entry.name.removesuffix(_SUFFIX)
                    if key_id == entry.name or not _ID.fullmatch(key_id):
                        continue
                    status = entry.stat()
                    found[key_id] = (status.st_mtime_ns, status.st_size, status.st_ino)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise storage_error(error, "list the keys in") from error
        return found

    def record(self, key_id: str) -> KeyRecord:
        """One key. Raises FileNotFoundError and StorageError."""
        path = self.directory / f"{key_id}{_SUFFIX}"
        try:
            record = _decoder.decode(path.read_bytes())
        except FileNotFoundError:
            raise
        except OSError as error:
            raise storage_error(error, "read") from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise StorageError(
                f"{path} is not the file of a key: {error}",
                hint="hpcserve replaces its files whole; was this one edited by hand?",
            ) from error
        if record.id != key_id:
            raise StorageError(
                f"{path} holds the key {record.id}",
                hint="a key's file is called after its id: rename it back",
            )
        return record
