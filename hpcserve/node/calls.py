"""JSON over HTTP inside the job, with the job's key and a bound on every call."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from ..http.bearer import bearer
from ..http.client import Pool, UpstreamError

_ANSWER_LIMIT = 64 << 20


class CallFailed(Exception):
    """A call that got no answer, or not the one it needs; the text says which."""


class Calls:
    """Requests to engines, the controller and the router."""

    def __init__(self, key: str, *, connect_timeout: float = 3.0) -> None:
        self._pool = Pool(connect_timeout=connect_timeout)
        self._headers = bearer(key)

    async def fetch(
        self,
        method: str,
        url: str,
        body: Any = None,
        *,
        seconds: float,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[int, bytes]:
        """Status and body. Raises CallFailed when there is no whole answer within `seconds`."""
        data = b"" if body is None else msgspec.json.encode(body)
        sent = [*self._headers, *((name.encode(), value.encode()) for name, value in headers.items())]
        if data:
            sent.append((b"content-type", b"application/json"))
        try:
            async with asyncio.timeout(seconds):
                response = await self._pool.request(method, url, headers=sent, body=data)
                async with response:
                    return response.status, await response.read(_ANSWER_LIMIT)
        except TimeoutError as error:
            raise CallFailed(f"{url} did not answer within {seconds:g} s") from error
        except UpstreamError as error:
            raise CallFailed(f"{url}: {error.message}") from error

    async def json(
        self,
        method: str,
        url: str,
        body: Any = None,
        *,
        seconds: float,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """The JSON object of a 200 answer. Raises CallFailed for everything else."""
        status, data = await self.fetch(method, url, body, seconds=seconds, headers=headers)
        if status != 200:
            raise CallFailed(f"{url} answered {status}: {data[:300].decode('utf-8', 'replace')}")
        try:
            answer = msgspec.json.decode(data)
        except msgspec.DecodeError as error:
            raise CallFailed(f"{url} did not answer in JSON") from error
        if not isinstance(answer, dict):
            raise CallFailed(f"{url} did not answer with an object")
        return answer

    async def healthy(self, url: str, seconds: float = 5.0) -> bool:
        """Does a health path answer 200 in time?"""
        try:
            status, _ = await self.fetch("GET", url, seconds=seconds)
        except CallFailed:
            return False
        return status == 200

    async def close(self) -> None:
        await self._pool.close()
