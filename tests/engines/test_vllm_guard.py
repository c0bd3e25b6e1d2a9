"""The middleware that asks for the job key on every path of vLLM."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import pytest

from hpcserve.engines.vllm_guard import JobKeyGuard

Messages = list[MutableMapping[str, Any]]


async def ask(guard: JobKeyGuard, *headers: tuple[bytes, bytes], kind: str = "http") -> Messages:
    sent: Messages = []

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    await guard({"type": kind, "path": "/metrics", "method": "GET", "headers": list(headers)}, receive, send)
    return sent


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> JobKeyGuard:
    monkeypatch.setenv("VLLM_API_KEY", "secret")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "passed"})

    return JobKeyGuard(app)


async def test_the_key_opens_every_path(guard: JobKeyGuard) -> None:
    assert await ask(guard, (b"authorization", b"Bearer secret")) == [{"type": "passed"}]


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"Bearer wrong")],
        [(b"authorization", b"secret")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Bearer secret\xff")],
        [(b"x-api-key", b"Bearer secret")],
        [(b"authorization", b"Bearer wrong"), (b"authorization", b"Bearer secret")],
    ],
)
async def test_without_it_nothing_is_answered(guard: JobKeyGuard, headers: list[tuple[bytes, bytes]]) -> None:
    start, body = await ask(guard, *headers)
    assert start["status"] == 401
    assert b"job key" in body["body"]
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()


async def test_websockets_are_closed(guard: JobKeyGuard) -> None:
    assert await ask(guard, kind="websocket") == [{"type": "websocket.close", "code": 1008}]


async def test_start_and_end_of_the_server_pass(guard: JobKeyGuard) -> None:
    assert await ask(guard, kind="lifespan") == [{"type": "passed"}]


@pytest.mark.parametrize("key", [None, ""])
def test_no_key_no_server(monkeypatch: pytest.MonkeyPatch, key: str | None) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("VLLM_API_KEY", key)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    with pytest.raises(RuntimeError, match="VLLM_API_KEY is not set"):
        JobKeyGuard(app)
