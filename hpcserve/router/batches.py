"""The Batch API's routes: passed through to the process that carries batches out, in bounded memory.

That process does all the work, for thousands of rows of a batch must not cost interactive requests anything
but the place that the admission gives them. It trusts us about whose key a request has.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import NoReturn

import msgspec

from ..http.bearer import bearer
from ..http.client import Pool
from ..http.errors import Header, HttpError, UpstreamError
from ..http.exchange import Exchange
from ..http.response import UpstreamResponse
from .call import id_headers
from .keys.identity import ANYONE, RUN, Identity

log = logging.getLogger(__name__)

_BODY_MAX = 1 << 40
"""The process has limits of its own, and states them."""
_KEPT = frozenset({b"content-type"})


class Address(msgspec.Struct, frozen=True):
    """What the process wrote down at its start."""

    url: str
    token: str


class Batches:
    """Passes requests on for one Router."""

    def __init__(self, file: Path | None, pool: Pool, served_name: str) -> None:
        """`file` has the process's Address; None: there is no such process."""
        self._file = file
        self._pool = pool
        self._served_name = served_name

    async def answer(self, exchange: Exchange, request_id: str, identity: Identity) -> None:
        """Raises HttpError."""
        if exchange.method == "POST":
            # All batches go to the served model: what the lines name is not asked.
            identity.check_model(self._served_name)
        address = await self._find()
        try:
            async with await self._ask(exchange, address, identity) as response:
                await _deliver(exchange, response, request_id)
        except UpstreamError as error:
            if exchange.started:
                log.warning("an answer of the Batch API broke off: %s", error.message)
                exchange.abort()
                return
            _away(error.message)

    async def _find(self) -> Address:
        """Looked up at each request, for each start of the process has a new one. Requests are few."""
        if self._file is None:
            raise HttpError(503, "this endpoint has no Batch API", code="no_batch_api")
        try:
            # In a thread: the file is on a shared file system.
            raw = await asyncio.to_thread(self._file.read_bytes)
            return msgspec.json.decode(raw, type=Address)
        except FileNotFoundError:
            _away("it is not there")
        except (OSError, msgspec.DecodeError) as error:
            _away(f"can't read {self._file.name}: {error}")

    async def _ask(self, exchange: Exchange, address: Address, identity: Identity) -> UpstreamResponse:
        # Nothing else of the client's: it can't say who it is.
        headers: list[Header] = [header for header in exchange.headers if header[0] in _KEPT]
        headers += bearer(address.token)
        if identity not in (RUN, ANYONE):
            headers.append((b"x-hpcserve-user", identity.name.encode()))
            headers.append((b"x-hpcserve-key", identity.key.encode()))
        url = address.url + exchange.target
        if exchange.method == "POST":
            return await self._pool.upload("POST", url, headers=headers, pieces=exchange.pieces(_BODY_MAX))
        return await self._pool.request(exchange.method, url, headers=headers)


async def _deliver(exchange: Exchange, response: UpstreamResponse, request_id: str) -> None:
    headers = [header for header in response.headers if header[0] in _KEPT]
    headers += id_headers(exchange.path, request_id)
    exchange.start(response.status, headers, length=response.length)
    exchange.on_flow(response.pause, response.resume)
    await response.pipe(exchange.write, exchange.hold)
    exchange.finish()


def _away(why: str) -> NoReturn:
    raise HttpError(
        503,
        f"the process of the Batch API does not answer ({why}); logs/batches.log of the run says more",
        headers=((b"retry-after", b"2"), (b"x-hpcserve-reason", b"no_batch_api")),
        code="no_batch_api",
    )
