"""The controller's HTTP API: agents report here, and the command line asks. All with the job's key."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from ...http.errors import HttpError
from ...http.exchange import Exchange
from .registry import Heartbeat

_BODY_LIMIT = 4 << 20
_KV_LIMIT = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """What the head does for callers."""

    heartbeat: Callable[[Heartbeat], Mapping[str, Any]]
    """Takes a report and returns the order for that agent. Raises KeyError for an unknown rank."""
    kv_news: Callable[[str, msgspec.Raw], None]
    """Takes news about a replica's KV cache, in JSON. Raises KeyError for an unknown replica."""
    status: Callable[[], Mapping[str, Any]]
    drain: Callable[[], None]
    stop: Callable[[], None]


class _KvNews(msgspec.Struct, frozen=True):
    """The body of `POST /agents/RANK/kv`; each message is an engines.kv_events.messages.KvMessage."""

    news: tuple[tuple[str, msgspec.Raw], ...]


class Controller:
    """Handler for `hpcserve.http.server.serve`."""

    def __init__(self, key: str, desk: Desk) -> None:
        self._authorization = b"Bearer " + key.encode()
        self._desk = desk

    async def handle(self, exchange: Exchange) -> None:
        try:
            if not hmac.compare_digest(exchange.header(b"authorization") or b"", self._authorization):
                raise HttpError(401, "the job key is missing or wrong")
            answer = await self._answer(exchange)
        except HttpError as error:
            exchange.fail_with(error)
            return
        exchange.respond(200, msgspec.json.encode(answer))

    async def _answer(self, exchange: Exchange) -> Mapping[str, Any]:
        match (exchange.method, exchange.path):
            case ("GET", "/status"):
                return self._desk.status()
            case ("POST", "/drain"):
                self._desk.drain()
                return {}
            case ("POST", "/stop"):
                self._desk.stop()
                return {}
            case ("POST", path) if path.startswith("/agents/") and path.endswith("/kv"):
                return await self._kv_news(exchange)
            case ("POST", path) if path.startswith("/agents/"):
                return await self._heartbeat(exchange, path.removeprefix("/agents/"))
        raise HttpError(404, f"no {exchange.method} {exchange.path} here")

    async def _heartbeat(self, exchange: Exchange, rank: str) -> Mapping[str, Any]:
        body = await exchange.body(_BODY_LIMIT)
        try:
            beat = msgspec.json.decode(body, type=Heartbeat)
        except msgspec.DecodeError as error:
            raise HttpError(400, f"not a heartbeat: {error}") from error
        if rank != str(beat.rank):
            raise HttpError(400, f"the path says rank {rank}, and the body {beat.rank}")
        try:
            return self._desk.heartbeat(beat)
        except KeyError as error:
            raise HttpError(404, f"the plan has no {error}") from error

    async def _kv_news(self, exchange: Exchange) -> Mapping[str, Any]:
        body = await exchange.body(_KV_LIMIT)
        try:
            told = msgspec.json.decode(body, type=_KvNews)
        except msgspec.DecodeError as error:
            raise HttpError(400, f"not news about KV caches: {error}") from error
        for replica, message in told.news:
            try:
                self._desk.kv_news(replica, message)
            except KeyError as error:
                raise HttpError(404, f"the plan has no {error}") from error
        return {}
