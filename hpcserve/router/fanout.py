"""A request for several choices over prefill and decode: all at once, answered as one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Protocol

import msgspec

from ..http.errors import HttpError, UpstreamError
from ..http.response import UpstreamResponse
from .call import Call, Json
from .choices import Choice, add_usage, join, whole_id
from .legs import Collected, Delivery, EngineAnswer, LegFailure
from .metrics import Metrics
from .relay import PromptIds, last_words
from .stream.asked import Asked, ask
from .stream.generated import GeneratedStream

log = logging.getLogger(__name__)

_AT_ONCE = 64
"""Choices of one request that run at the same time."""
_ANSWER_MAX = 256 * 1024 * 1024
_EVENT_STREAM = (b"content-type", b"text/event-stream; charset=utf-8")


class Generate(Protocol):
    """Runs one choice, on as many workers as it takes."""

    def __call__(self, body: Json, delivery: Delivery, request_id: str) -> Awaitable[None]: ...


async def run(generate: Generate, call: Call, choices: list[Choice], metrics: Metrics) -> Json | None:
    """Answer `call` from all `choices`; returns what they used together.

    Raises HttpError and EngineAnswer before the start.
    """
    if call.streams:
        return await _stream(generate, call, choices, metrics)
    return await _whole(generate, call, choices)


async def _whole(generate: Generate, call: Call, choices: list[Choice]) -> Json | None:
    answers = [Collected(_ANSWER_MAX) for _ in choices]
    turn = asyncio.Semaphore(_AT_ONCE)

    async def one(choice: Choice, answer: Collected) -> None:
        async with turn:
            await generate(choice.body, answer, choice.request_id(call.request_id))
        if answer.status != 200:
            raise EngineAnswer(answer.status, answer.headers, answer.body)

    await _all(one(choice, answer) for choice, answer in zip(choices, answers, strict=True))
    parts = [(choice, _object(answer.body)) for choice, answer in zip(choices, answers, strict=True)]
    whole = join(parts, call.request_id)
    call.exchange.respond(200, msgspec.json.encode(whole), headers=call.begin())
    return whole.get("usage")


def _object(body: bytes) -> Json:
    try:
        value = msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        raise HttpError(502, f"an engine's answer is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise HttpError(502, "an engine's answer is not a JSON object")
    return value


async def _stream(generate: Generate, call: Call, choices: list[Choice], metrics: Metrics) -> Json | None:
    joined = _JoinedStream(call, metrics)
    turn = asyncio.Semaphore(_AT_ONCE)

    async def one(choice: Choice) -> None:
        async with turn:
            delivery = ChoiceStream(joined, choice)
            await generate(choice.body, delivery, choice.request_id(call.request_id))
        if delivery.stream is not None and not delivery.stream.wants_usage:
            joined.count(choice, delivery.stream.usage)

    try:
        await _all(one(choice) for choice in choices)
    except (LegFailure, EngineAnswer, HttpError) as error:
        if not call.exchange.started:
            raise
        joined.break_off(error)
        return joined.usage
    joined.finish()
    return joined.usage


async def _all(legs: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all legs; when one fails or we are cancelled, cancel the others, then raise."""
    tasks = [asyncio.create_task(leg) for leg in legs]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _JoinedStream:
    """The client's one stream, fed by the streams of all choices."""

    def __init__(self, call: Call, metrics: Metrics) -> None:
        self.call = call
        self._metrics = metrics
        self.usage: Json | None = None
        self._usage_event: Json | None = None
        self._running: set[UpstreamResponse] = set()
        self._paused = False
        self._id: object = None
        self._created: object = None

    def start(self) -> None:
        """The first of the choices has something."""
        exchange = self.call.exchange
        if not exchange.started:
            self._metrics.ttft.observe(asyncio.get_running_loop().time() - self.call.arrived)
            exchange.start(200, [_EVENT_STREAM, *self.call.begin()])
            exchange.on_flow(self._pause, self._resume)

    def join(self, response: UpstreamResponse) -> None:
        self._running.add(response)
        if self._paused:
            response.pause()

    def leave(self, response: UpstreamResponse) -> None:
        self._running.discard(response)

    def _pause(self) -> None:
        self._paused = True
        for response in self._running:
            response.pause()

    def _resume(self) -> None:
        self._paused = False
        for response in self._running:
            response.resume()

    def event(self, choice: Choice, event: Json) -> None:
        """Pass one event on under the whole request's id and the choice's index; usage waits for the end."""
        if self._id is None:
            self._id = whole_id(event.get("id"), choice, self.call.request_id)
            self._created = event.get("created")
        event["id"] = self._id
        if "created" in event:
            event["created"] = self._created
        if not event.get("choices") and event.get("usage") is not None:
            self.count(choice, event["usage"])
            self._usage_event = self._usage_event or event
            return
        for entry in event.get("choices") or ():
            entry["index"] = choice.index
        self._send(event)

    def count(self, choice: Choice, usage: Json | None) -> None:
        self.usage = add_usage(self.usage, usage, with_prompt=choice.first_of_prompt)

    def _send(self, event: Json) -> None:
        self.call.exchange.write(b"data: " + msgspec.json.encode(event) + b"\n\n")

    def finish(self) -> None:
        if self._usage_event is not None:
            self._send({**self._usage_event, "usage": self.usage})
        self.call.exchange.write(b"data: [DONE]\n\n")
        self.call.exchange.finish()

    def break_off(self, error: LegFailure | EngineAnswer | HttpError) -> None:
        self._metrics.broken_streams.add()
        log.warning("a stream of %s ended with an error: %s", self.call.request_id, error)
        self._metrics.errors.add(("reason", "stream_error"))
        self.call.exchange.write(last_words(self.call.exchange.path, error))
        self.call.exchange.finish(close=True)


class ChoiceStream:
    """One choice's stream on its way into the joined one."""

    def __init__(self, joined: _JoinedStream, choice: Choice) -> None:
        self._joined = joined
        self._choice = choice
        self._asked = ask(choice.body)
        self._on_prompt_ids: PromptIds | None = None
        self.stream: GeneratedStream | None = None

    def expect(self, asked: Asked, on_prompt_ids: PromptIds | None) -> None:
        self._asked = asked
        self._on_prompt_ids = on_prompt_ids

    @property
    def started(self) -> bool:
        return self.stream is not None

    @property
    def pieces(self) -> int:
        return 0 if self.stream is None else self.stream.pieces

    async def deliver(self, response: UpstreamResponse, first: bytes) -> None:
        if response.status != 200:
            body = first + await response.read(_ANSWER_MAX)
            raise EngineAnswer(response.status, response.headers, body)
        held: list[bytes] = []
        chat = self._joined.call.exchange.path == "/v1/chat/completions"
        stream = GeneratedStream(held.append, self._asked, chat=chat, on_prompt_ids=self._on_prompt_ids)
        while True:
            stream.feed(first)
            if held or not first:
                break
            first = await response.next_chunk()
        self.stream = stream
        stream.write_to(self.write)
        self._joined.start()
        self.write(b"".join(held))
        await self.carry(response, b"", stream.feed)
        stream.end()

    async def carry(self, response: UpstreamResponse, first: bytes, sink: Callable[[bytes], None]) -> None:
        self._joined.join(response)
        try:
            if first:
                sink(first)
            await response.pipe(sink)
        finally:
            self._joined.leave(response)

    def finish(self) -> None:
        """The joined stream goes on until all its choices are there."""

    def write(self, data: bytes) -> None:
        for line in data.splitlines():
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                continue
            try:
                event = msgspec.json.decode(payload)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise UpstreamError("protocol", f"an event is not JSON: {error}") from None
            if not isinstance(event, dict):
                raise UpstreamError("protocol", "an event is not a JSON object")
            choices = event.get("choices") or ()
            if not isinstance(choices, list | tuple) or not all(isinstance(entry, dict) for entry in choices):
                raise UpstreamError("protocol", "an event's `choices` is no list of objects")
            self._joined.event(self._choice, event)
