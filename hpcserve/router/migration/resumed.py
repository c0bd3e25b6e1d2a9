"""A stream that goes on from its tokens: a completion's chunks become the client's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from ...http.response import UpstreamResponse
from ..stream.generated import EngineFault, GeneratedStream, given_up
from .chunks import CannotGoOn, Chunks, Json, chunk, text_choice
from .tokens import Cut

_REFUSAL_MAX = 1024 * 1024


class Client(Protocol):
    """Where a stream goes that several engines write."""

    stream: GeneratedStream | None

    async def carry(
        self, response: UpstreamResponse, first: bytes, sink: Callable[[bytes], None]
    ) -> None: ...
    def write(self, data: bytes) -> None: ...
    def finish(self) -> None: ...


class _Complete(Exception):
    """The router itself found the answer's end."""


class Resumed:
    """The delivery of one request that goes on with a client's stream."""

    def __init__(
        self,
        client: Client,
        stream: GeneratedStream,
        cut: Cut,
        *,
        prompt_tokens: int,
        body: Json,
        stop_member: str = "stop_reason",
    ) -> None:
        self._client = client
        self._stream = stream
        self._stop_member = stop_member
        self._prompt = prompt_tokens
        self._before = cut.tokens
        self._cut = cut
        stops = body.get("stop") or ()
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        options = body.get("stream_options") or {}
        self._counts = bool(stream.wants_usage and options.get("continuous_usage_stats"))
        self._watched: str | None = cut.rest or None
        """Text in which a stop string can begin that the engine does not know all of."""
        self._chunks = Chunks(self._take)
        self.started = False

    @property
    def pieces(self) -> int:
        return self._chunks.pieces

    async def deliver(self, response: UpstreamResponse, first: bytes) -> None:
        if response.status != 200:
            body = first + await response.read(_REFUSAL_MAX)
            raise CannotGoOn(f"the engine answered {response.status}: {body[:200].decode(errors='replace')}")
        try:
            await self._client.carry(response, first, self._chunks.feed)
        except _Complete:
            response.abort()
            return

    def _take(self, event: Json | None) -> None:
        stream = self._stream
        if event is None:
            stream.done = True
            self._client.write(b"data: [DONE]\n\n")
            return
        if (error := event.get("error")) is not None:
            message = str(error.get("message") if isinstance(error, dict) else error)
            raise EngineFault(message, status=500, event=None)
        choices = event.get("choices")
        if not choices:
            if isinstance(usage := event.get("usage"), dict):
                self._end(usage)
            return
        self._choice(choices[0])

    def _choice(self, choice: Json) -> None:
        finish, stop = choice.get("finish_reason"), choice.get(self._stop_member)
        if finish == "abort":
            raise given_up()
        ids = choice.get("token_ids") or []
        if not self.started:
            self._begin()
        stream = self._stream
        text, found = self._released(choice.get("text") or "", finish is not None)
        stream.ids += b"".join(b"%d," % token for token in ids)
        if found is not None:
            finish, stop = "stop", found
        if text or finish is not None or ids:
            self._send(text, ids, finish, stop)
        if found is not None:
            done = stream.tokens
            self._end({"completion_tokens": done - self._before})
            self._client.write(b"data: [DONE]\n\n")
            stream.done = True
            raise _Complete

    def _begin(self) -> None:
        """From here the account of the stream is this engine's."""
        self.started = True
        self._stream.ids[:] = self._cut.ids
        self._stream.reached = len(self._stream.ids)

    def _send(self, text: str, ids: list[int], finish: str | None, stop: Any) -> None:
        stream = self._stream
        stream.events += 1
        if text:
            stream.text += msgspec.json.encode(text)[1:-1]
            stream.reached = len(stream.ids)
            stream.single = len(ids) == 1 and self._watched is None
        stream.finished = finish is not None
        usage = self._usage({"completion_tokens": stream.tokens - self._before}) if self._counts else None
        choice = text_choice(stream, text, ids, finish=finish, stop=stop, stop_member=self._stop_member)
        self._client.write(chunk(stream, choice, usage))

    def _released(self, text: str, last: bool) -> tuple[str, str | None]:
        """What of the text may go to the client, and the stop string that ends the answer."""
        if self._watched is None:
            return text, None
        self._watched += text
        ends = [
            (place + len(stop), place, stop)
            for stop in self._stops
            if 0 <= (place := self._watched.find(stop)) < len(self._cut.rest)
        ]
        if ends:
            _, place, found = min(ends)
            return self._watched[:place], found
        if not last and len(self._watched) < len(self._cut.rest) + max(map(len, self._stops), default=0) - 1:
            return "", None
        released, self._watched = self._watched, None
        return released, None

    def _usage(self, theirs: Json) -> Json:
        completion = self._before + int(theirs.get("completion_tokens") or 0)
        total = self._prompt + completion
        return {"prompt_tokens": self._prompt, "total_tokens": total, "completion_tokens": completion}

    def _end(self, theirs: Json) -> None:
        stream = self._stream
        stream.usage = self._usage(theirs)
        if stream.wants_usage:
            self._client.write(chunk(stream, None, stream.usage))
