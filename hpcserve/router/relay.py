"""An engine's answer to the client."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ..http.errors import Header, HttpError
from ..http.response import UpstreamResponse
from .call import Call
from .legs import EngineAnswer, LegFailure
from .metrics import Metrics
from .stream.asked import Asked
from .stream.events import EventStream, error_event
from .stream.generated import GIVEN_UP, GeneratedStream, given_up

log = logging.getLogger(__name__)

_WHOLE = 1024 * 1024
"""Answers up to this size are read whole before the client gets a byte, so they can be tried again."""

PromptIds = Callable[[bytes], bool]


class _Counted(msgspec.Struct):
    usage: dict[str, Any] | None = None


_counted = msgspec.json.Decoder(_Counted)


class ClientDelivery:
    """Hands an engine's answer to the client as it comes."""

    def __init__(self, call: Call, metrics: Metrics) -> None:
        self._call = call
        self._exchange = call.exchange
        self.events_to: Callable[[bytes], None] = call.exchange.write
        """Takes the whole events of a stream that nobody could go on with."""
        self._metrics = metrics
        self._events: EventStream | None = None
        self._asked: Asked | None = None
        self._on_prompt_ids: PromptIds | None = None
        self._first_at = 0.0
        self._pieces = 0
        self._usage: dict[str, Any] | None = None
        self.stream: GeneratedStream | None = None
        """The account of a stream that another worker could go on with."""

    def expect(self, asked: Asked, on_prompt_ids: PromptIds | None) -> None:
        """The answer will be a stream of generated text, asked for with `asked.added`."""
        self._asked = asked
        self._on_prompt_ids = on_prompt_ids

    @property
    def started(self) -> bool:
        return self._exchange.started

    @property
    def pieces(self) -> int:
        if self.stream is not None:
            return self.stream.pieces
        return self._pieces if self._events is None else self._events.pieces

    @property
    def usage(self) -> dict[str, Any] | None:
        """What the engine counted, once the answer is whole; None where it doesn't say."""
        return self._usage if self.stream is None else self.stream.usage

    @property
    def inter_token(self) -> float | None:
        """Mean seconds between two events of a stream that has had more than one."""
        return None if self.stream is None else inter_token(self.stream, self._first_at)

    async def deliver(self, response: UpstreamResponse, first: bytes) -> None:
        exchange = self._exchange
        kind = response.header(b"content-type") or b""
        length = response.length
        if kind.startswith(b"text/event-stream"):
            await self._stream(response, first)
            return
        if length is not None and length <= _WHOLE and exchange.method != "HEAD":
            body = first + await response.read(_WHOLE)
            if GIVEN_UP in body:
                raise given_up()
            self._usage = _usage(body) if kind.startswith(b"application/json") else None
            self._start(response, len(body))
            exchange.write(body)
        else:
            self._start(response, length)
            await self._pipe(response, first, self._pass)
        exchange.finish()

    async def _stream(self, response: UpstreamResponse, first: bytes) -> None:
        if self._asked is None:
            self._begin(response)
            self._events = EventStream(self.events_to)
            await self._pipe(response, first, self._events.feed)
            self._events.end()
            if self._events.has_error:
                self._broken("the engine ended the stream with an error")
            self._exchange.finish()
            return
        held: list[bytes] = []
        stream = GeneratedStream(
            held.append, self._asked, chat=_is_chat(self._call), on_prompt_ids=self._on_prompt_ids
        )
        while True:
            # An error that comes first can still be another worker's answer.
            stream.feed(first)
            if held or not first:
                break
            first = await response.next_chunk()
        self.stream = stream
        self._begin(response)
        self._exchange.write(b"".join(held))
        stream.write_to(self._exchange.write)
        await self._pipe(response, b"", stream.feed)
        stream.end()
        if stream.has_error:
            self._broken("the engine ended the stream with an error")
        self._exchange.finish()

    def adopt(self, stream: GeneratedStream, first_at: float) -> None:
        """The answer has begun: a stream that somebody else wrote so far, since `first_at`."""
        self.stream, self._first_at = stream, first_at
        stream.write_to(self._exchange.write)

    def _begin(self, response: UpstreamResponse) -> None:
        self._first_at = asyncio.get_running_loop().time()
        self._metrics.ttft.observe(self._first_at - self._call.arrived)
        self._start(response, None)

    def _start(self, response: UpstreamResponse, length: int | None) -> None:
        self._exchange.start(response.status, self._call.begin(response.headers), length=length)

    def _pass(self, piece: bytes) -> None:
        self._pieces += 1
        self._exchange.write(piece)

    async def _pipe(self, response: UpstreamResponse, first: bytes, sink: Callable[[bytes], None]) -> None:
        self._exchange.on_flow(response.pause, response.resume)
        if first:
            sink(first)
        await response.pipe(sink, self._exchange.hold)

    # A stream that goes on at another worker

    async def carry(self, response: UpstreamResponse, first: bytes, sink: Callable[[bytes], None]) -> None:
        """Feed the rest of the stream, from another worker, to `sink`, as fast as the client reads."""
        await self._pipe(response, first, sink)

    def write(self, data: bytes) -> None:
        self._exchange.write(data)

    def finish(self) -> None:
        """The stream is whole."""
        self._exchange.finish()

    def break_off(self, error: LegFailure | HttpError | EngineAnswer) -> None:
        """The answer broke after its start: end it so that the client can't take it for whole."""
        if self._exchange.finished:
            return
        if self.stream is None and self._events is None:
            self._metrics.broken_streams.add()
            self._exchange.abort()
            return
        self._broken(str(error))
        self._exchange.write(last_words(self._call.exchange.path, error))
        self._exchange.finish(close=True)

    def _broken(self, why: str) -> None:
        count_broken(self._call, self._metrics, why)


def is_stream(status: int, headers: Sequence[Header]) -> bool:
    """Is the answer a stream of events?"""
    kind = next((value for name, value in headers if name == b"content-type"), b"")
    return status == 200 and kind.startswith(b"text/event-stream")


def count_broken(call: Call, metrics: Metrics, why: str) -> None:
    """A stream of text did not get to its own end."""
    log.warning("the stream of %s broke: %s", call.request_id, why)
    metrics.errors.add(("reason", "stream_error"))
    metrics.broken_streams.add()


def inter_token(stream: GeneratedStream, first_at: float) -> float | None:
    """Mean seconds between two events of a stream that has ended now; None where there was just one."""
    if stream.events < 2:
        return None
    return (asyncio.get_running_loop().time() - first_at) / (stream.events - 1)


def last_words(path: str, error: LegFailure | HttpError | EngineAnswer) -> bytes:
    """The event that ends a stream which `error` broke."""
    if isinstance(error, LegFailure):
        if error.event is not None:
            return error.event
        error = error.http_error()
    if isinstance(error, HttpError):
        return error_event(path, error.status, error.message, error.code)
    return error_event(path, error.status, "an engine refused to go on with the answer")


def _is_chat(call: Call) -> bool:
    return call.exchange.path == "/v1/chat/completions"


def _usage(body: bytes) -> dict[str, Any] | None:
    try:
        return _counted.decode(body).usage
    except (msgspec.DecodeError, UnicodeDecodeError):
        # Not this API's; its length stands.
        return None
