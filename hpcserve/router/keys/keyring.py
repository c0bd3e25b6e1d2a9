"""Which identity a request's key stands for."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...errors import HpcserveError
from ...http.errors import HttpError
from ...http.exchange import Exchange
from .identity import ANYONE, RUN, Identity
from .store import KeyRecord, KeyStore, digest, id_of

log = logging.getLogger(__name__)

_EVERY = 2.0
"""Seconds between two looks at the directory of keys."""
_NOBODY = bytes(32)


class KeyRing:
    """The run's own key, and those of a directory.

    With neither, everyone is let in. The directory may come later; a thread looks at it every two seconds,
    so that a slow file system holds up no request. A file that can't be read keeps what it last said.
    """

    def __init__(self, api_key: str | None = None, directory: Path | None = None) -> None:
        self._run = None if api_key is None else digest(api_key.encode())
        self._store = None if directory is None else KeyStore(directory)
        self._open = api_key is None and directory is None
        self._records: dict[str, KeyRecord] = {}
        self._keys: Mapping[str, tuple[bytes, Identity]] = {}
        self._good: dict[bytes, Identity] = {}
        """Keys that were found good. A lookup takes as long whether or not a key begins like one of these: it
        compares keyed hashes first."""
        self._versions: Mapping[str, tuple[int, int, int]] = {}
        self._warned: set[str] = set()
        self._watch: asyncio.Task[None] | None = None
        if self._store is not None:
            self.reload()

    def identify(self, exchange: Exchange) -> Identity:
        """Raises HttpError 401 without a key that is good here.

        Takes `Authorization: Bearer KEY`, and `x-api-key: KEY` as clients of the Anthropic API send it.
        """
        if self._open:
            return ANYONE
        if self._watch is None and self._store is not None:
            self._watch = asyncio.create_task(self._look())
        given = _given(exchange)
        good = self._good
        known = good.get(given)
        if known is not None:
            return known if known is not RUN else self._principal(exchange)
        found = digest(given)
        # What the id leads to is public; the digests of secrets are compared in constant time.
        wanted, identity = self._keys.get(id_of(given), (self._run or _NOBODY, RUN))
        if hmac.compare_digest(found, wanted):
            good[given] = identity
            return identity if identity is not RUN else self._principal(exchange)
        raise self._refusal(given)

    def _principal(self, exchange: Exchange) -> Identity:
        """Who the run itself asks for: the key that `x-hpcserve-on-behalf` has the id of, else the run.

        So the requests of a batch count against the limits of whoever made it. From anybody else the header
        means nothing. Raises HttpError 401 for a key that is not good any more.
        """
        asked = exchange.header(b"x-hpcserve-on-behalf")
        if asked is None:
            return RUN
        key = asked.decode("ascii", "replace")
        found = self._keys.get(key)
        if found is None:
            raise HttpError(401, f"the API key {key[:20]!r} is not good any more", code="invalid_api_key")
        return found[1]

    def identities(self) -> Iterable[Identity]:
        """Of all keys of the directory that are good."""
        return [identity for _, identity in self._keys.values()]

    def _refusal(self, given: bytes) -> HttpError:
        record = self._records.get(id_of(given))
        if record is not None and record.revoked is not None:
            told = f"the API key {record.id} was revoked"
        elif given:
            told = "the API key is wrong"
        else:
            told = "an API key is needed: Authorization: Bearer KEY, or x-api-key: KEY"
        return HttpError(
            401,
            told,
            headers=((b"www-authenticate", b"Bearer"), (b"x-hpcserve-reason", b"invalid_api_key")),
            code="invalid_api_key",
        )

    def reload(self) -> None:
        """Look at the directory now. What is wrong with it is warned of once."""
        if self._store is None:
            return
        try:
            versions = self._store.versions()
        except HpcserveError as error:
            self._warn("", error, "the keys known so far stay valid")
            return
        self._warned.discard("")
        if versions == self._versions and not self._warned:
            return
        records: dict[str, KeyRecord] = {}
        for key_id in versions:
            try:
                records[key_id] = self._store.record(key_id)
                self._warned.discard(key_id)
            except FileNotFoundError:
                continue
            except HpcserveError as error:
                last = self._records.get(key_id)
                kept = "it is as it was before" if last is not None else "nobody can use it"
                self._warn(key_id, error, f"key {key_id}: {kept}")
                if last is not None:
                    records[key_id] = last
        self._warned &= versions.keys()
        self._versions = versions
        self._records = records
        self._keys = {
            record.id: (bytes.fromhex(record.sha256), record.identity())
            for record in records.values()
            if record.revoked is None
        }
        # A new one, and last: what another thread finds good meanwhile by the old keys is forgotten.
        self._good = {}

    def _warn(self, what: str, error: HpcserveError, outcome: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            log.warning("%s; %s (%s)", error.message, outcome, error.hint)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_EVERY)
            await asyncio.to_thread(self.reload)

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait((self._watch,))


def _given(exchange: Exchange) -> bytes:
    """The key of a request; b"" for none. `authorization` counts before `x-api-key`."""
    value = exchange.header(b"authorization")
    if value is None:
        return (exchange.header(b"x-api-key") or b"").strip()
    if value.startswith(b"Bearer "):
        return value[7:].strip()
    scheme, _, key = value.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""
