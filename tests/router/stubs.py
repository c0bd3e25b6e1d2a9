"""Engines of a few lines that speak the two-leg protocol, and a router in front of them, in one process."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from hpcserve.http.client import Pool, UpstreamResponse
from hpcserve.http.errors import HttpError
from hpcserve.http.server import Exchange, Server, serve
from hpcserve.router.app import Router
from hpcserve.router.config import RouterConfig, WorkerSpec
from hpcserve.router.control import Table
from hpcserve.router.workers import Worker
from tests.patience import DEADLINE

KEY = "sk-client"
JOB_KEY = "job-secret"
Json = dict[str, Any]


async def until(condition: Callable[[], Any], what: str) -> None:
    """Returns when the condition is true; fails the test after a deadline."""
    try:
        async with asyncio.timeout(DEADLINE):
            while not condition():  # noqa: ASYNC110 - a test may poll
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"waited {DEADLINE} s for {what}") from None


def tokens(prompt: Any) -> list[Any]:
    """What the stubs take for the tokens of a prompt or of messages."""
    if isinstance(prompt, str):
        return prompt.split()
    if prompt and isinstance(prompt[0], dict):
        return " ".join(message["content"] for message in prompt).split()
    return list(prompt)


def words(body: Json, choice: int) -> list[str]:
    """A stub's answer: a pure function of prompt, seed and choice, as n choices of one engine are."""
    prompt = body.get("prompt", body.get("messages"))
    seed = body.get("seed")
    mark = "-" if seed is None else seed + choice
    return [f"{word}/{mark} " for word in tokens(prompt)[: body.get("max_tokens") or 3]]


@dataclasses.dataclass
class Seen:
    """A request as an engine got it."""

    path: str
    method: str
    headers: list[tuple[bytes, bytes]]
    raw: bytes
    body: Any
    gone: bool = False

    def header(self, name: bytes) -> bytes | None:
        return dict(self.headers).get(name)


class Stub:
    """One engine. `behave`, if set, is asked first and may answer instead: it returns True then."""

    def __init__(self, name: str, role: str) -> None:
        self.name = name
        self.role = role
        self.seen: list[Seen] = []
        self.running = 0
        self.behave: Callable[[Exchange, Seen], Awaitable[bool]] | None = None
        self.gap = 0.0
        self.ports: dict[str, int] = {}
        self.server: Server | None = None
        self.kv: Json | None = {"remote_engine_id": name, "tp_size": 1, "unknown": [[1, 2], [3]]}

    async def start(self) -> Stub:
        self.server = await serve(self._handle)
        return self

    @property
    def spec(self) -> WorkerSpec:
        assert self.server is not None
        url = f"http://127.0.0.1:{self.server.port}"
        return WorkerSpec(name=self.name, role=self.role, url=url, ports=self.ports)  # type: ignore[arg-type]

    async def stop(self) -> None:
        assert self.server is not None
        await self.server.close()

    async def _handle(self, exchange: Exchange) -> None:
        raw = await exchange.body(1 << 30)
        body = msgspec.json.decode(raw) if raw else None
        seen = Seen(exchange.path, exchange.method, exchange.headers, raw, body)
        self.seen.append(seen)
        self.running += 1
        try:
            if self.behave is not None and await self.behave(exchange, seen):
                return
            await self._answer(exchange, body)
        finally:
            self.running -= 1
            seen.gone = exchange.closed.done()

    async def _answer(self, exchange: Exchange, body: Json) -> None:
        params = (body or {}).get("kv_transfer_params") or {}
        chat = exchange.path == "/v1/chat/completions"
        if exchange.path not in ("/v1/completions", "/v1/chat/completions"):
            exchange.respond(200, msgspec.json.encode({"path": exchange.path, "body": body}))
            return
        request_id = (exchange.header(b"x-request-id") or b"?").decode()
        envelope = {
            "id": ("chatcmpl-" if chat else "cmpl-") + request_id,
            "object": "chat.completion" if chat else "text_completion",
            "created": 1700000000,
            "model": body["model"],
        }
        if params.get("do_remote_decode"):
            kv = dict(self.kv, do_remote_prefill=True) if self.kv else None
            answer = envelope | {"choices": [], "kv_transfer_params": kv}
            exchange.respond(200, msgspec.json.encode(answer))
            return
        if body.get("stream"):
            await self._stream(exchange, body, envelope, chat)
        else:
            exchange.respond(200, msgspec.json.encode(envelope | whole(body, chat)))

    async def _stream(self, exchange: Exchange, body: Json, envelope: Json, chat: bool) -> None:
        exchange.start(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
        parts = list(events(body, chat))
        for part in parts:
            if exchange.closed.done():
                return
            exchange.write(b"data: " + msgspec.json.encode(envelope | part) + b"\n\n")
            await exchange.drain()
            await asyncio.sleep(self.gap)
        exchange.write(b"data: [DONE]\n\n")
        exchange.finish()


def prompts(body: Json) -> list[Any]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and not all(isinstance(item, int) for item in prompt):
        return prompt
    return [prompt if prompt is not None else body.get("messages")]


def usage(body: Json) -> Json:
    each = [len(tokens(prompt)) for prompt in prompts(body)]
    n = body.get("n") or 1
    written = sum(len(words({**body, "prompt": prompt}, i)) for prompt in prompts(body) for i in range(n))
    return {
        "prompt_tokens": sum(each),
        "completion_tokens": written,
        "total_tokens": sum(each) + written,
        "prompt_tokens_details": None,
    }


def whole(body: Json, chat: bool) -> Json:
    choices: list[Json] = []
    for prompt in prompts(body):
        for i in range(body.get("n") or 1):
            text = "".join(words({**body, "prompt": prompt}, i))
            answer = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choices.append({"index": len(choices), **answer, "finish_reason": "length"})
    return {"choices": choices, "usage": usage(body), "kv_transfer_params": None}


def events(body: Json, chat: bool) -> Any:
    index = 0
    for prompt in prompts(body):
        for i in range(body.get("n") or 1):
            for word in words({**body, "prompt": prompt}, i):
                piece = {"delta": {"content": word}} if chat else {"text": word}
                yield {"choices": [{"index": index, **piece, "finish_reason": None}]}
            index += 1
    if (body.get("stream_options") or {}).get("include_usage"):
        yield {"choices": [], "usage": usage(body)}


class Bench:
    """Stub engines, a router and a client for it."""

    def __init__(self) -> None:
        self.stubs: dict[str, Stub] = {}
        self.suspects: list[tuple[str, str]] = []
        self.pool = Pool()
        self.router: Router
        self.server: Server

    async def start(self, *roles: str, **settings: Any) -> Bench:
        """One stub per name such as `prefill-0`; `settings` are the router's."""
        for name in roles:
            self.stubs[name] = await Stub(name, name.partition("-")[0]).start()
        defaults: Json = {
            "served_name": "toy",
            "engine": "vllm",
            "api_key": KEY,
            "job_key": JOB_KEY,
            "policy": "round_robin",
        }
        config = RouterConfig(**(defaults | settings))
        self.router = Router(config, on_suspect=self._suspect)
        self.server = await serve(
            self.router.handle,
            quick=self.router.fast_path.quick,
            express=self.router.fast_path,
            cancel_on_disconnect=True,
        )
        self.table()
        return self

    def _suspect(self, worker: Worker, reason: str) -> None:
        self.suspects.append((worker.name, reason))

    def table(self, *leave_out: str, state: Any = "ready", **fields: Any) -> None:
        """Announce all stubs but `leave_out`."""
        specs = tuple(stub.spec for name, stub in self.stubs.items() if name not in leave_out)
        self.router.update(Table(state=state, workers=specs, **fields))

    def __getitem__(self, name: str) -> Stub:
        return self.stubs[name]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    async def open(
        self, path: str, body: Any = None, *, key: str | None = KEY, method: str = "POST", **headers: str
    ) -> UpstreamResponse:
        """The response to one request, its body unread."""
        given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        if key is not None:
            given.append((b"authorization", f"Bearer {key}".encode()))
        raw = body if isinstance(body, bytes) else b"" if body is None else msgspec.json.encode(body)
        return await self.pool.request(method, self.url + path, headers=given, body=raw)

    async def ask(self, path: str, body: Any = None, **options: Any) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and whole body."""
        async with asyncio.timeout(DEADLINE):
            response = await self.open(path, body, **options)
            data = await response.read(1 << 30)
        headers = {name.decode(): value.decode() for name, value in response.headers}
        return response.status, headers, data

    async def json(self, path: str, body: Any = None, **options: Any) -> Any:
        status, _, data = await self.ask(path, body, **options)
        assert status == 200, data
        return msgspec.json.decode(data)

    async def error(self, path: str, body: Any = None, **options: Any) -> tuple[int, Json]:
        status, headers, data = await self.ask(path, body, **options)
        error = msgspec.json.decode(data)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert headers["x-request-id"]
        return status, error

    def metric(self, line: str) -> float:
        """The value behind `name{labels}` in the router's metrics; 0 if it is not there."""
        for text in self.router.metrics.render(self.router.own.gauges()).splitlines():
            if text.startswith(line + " "):
                return float(text.rpartition(" ")[2])
        return 0.0

    async def close(self) -> None:
        await self.pool.close()
        await self.server.close()
        await self.router.close()
        for stub in self.stubs.values():
            await stub.stop()


def answer_with(status: int, message: str = "stub") -> Callable[[Exchange, Seen], Awaitable[bool]]:
    """A behaviour: refuse every request with this status."""

    async def behave(exchange: Exchange, seen: Seen) -> bool:
        exchange.fail_with(HttpError(status, message))
        return True

    return behave


async def hang(exchange: Exchange, seen: Seen) -> bool:
    """A behaviour: never answer."""
    await exchange.closed
    return True


async def drop(exchange: Exchange, seen: Seen) -> bool:
    """A behaviour: close the connection without a word."""
    exchange.abort()
    return True


def sse(data: bytes) -> list[Any]:
    """The events of a stream, decoded; `[DONE]` as it is."""
    assert data.endswith(b"\n\n"), data[-100:]
    found = []
    for event in data.split(b"\n\n")[:-1]:
        assert event.startswith(b"data: "), event
        found.append("[DONE]" if event == b"data: [DONE]" else msgspec.json.decode(event[6:]))
    return found
