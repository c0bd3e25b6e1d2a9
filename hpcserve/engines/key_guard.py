"""Runs inside an engine: asks for the job key on every path.

Engines' own API keys leave /metrics, /health and others open; on a shared cluster anybody can reach them.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, ClassVar

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_BODY = b'{"error":{"message":"the job key is missing or wrong","type":"invalid_request_error","code":401}}'


class KeyGuard:
    """ASGI middleware: 401 without `Authorization: Bearer KEY`. No key, no server."""

    variable: ClassVar[str]
    """Environment variable that has the key."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._expected = b"Bearer " + job_key(self.variable).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_BODY)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _BODY})

    def _allowed(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


def job_key(variable: str) -> str:
    """The key, from the environment. Raises RuntimeError when it is not there."""
    key = os.environ.get(variable)
    if not key:
        raise RuntimeError(f"{variable} is not set, so this engine would answer to anybody")
    return key
