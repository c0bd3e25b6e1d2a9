"""Chunks of a client's stream, built by the router in the form vLLM gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from ...http.errors import UpstreamError
from ..stream.events import HELD_MAX, whole_events
from ..stream.generated import GeneratedStream

Json = dict[str, Any]

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class CannotGoOn(Exception):
    """This way of going on with a stream does not work; the client has had nothing of it."""


def chunk(stream: GeneratedStream, choice: Json | None, usage: Json | None = None) -> bytes:
    """One event under the id, creation time and model of the stream."""
    inner = b"" if choice is None else _encode(choice)
    tail = b"" if usage is None else b',"usage":' + _encode(usage)
    return b"data: " + stream.head + b'"choices":[' + inner + b"]" + tail + b"}\n\n"


def text_choice(
    stream: GeneratedStream,
    text: str,
    ids: list[int],
    *,
    finish: str | None = None,
    stop: Any = None,
    stop_member: str = "stop_reason",
) -> Json:
    """The only choice of a chunk. The fields are those of vLLM's chunks, in its order, but for the name of
    the one that says what ended the answer."""
    named = ids if stream.wants_ids else None
    if stream.chat:
        choice: Json = {
            "index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": finish,
        }  # fmt: skip
        if finish is not None:
            choice[stop_member] = stop
        return choice | {"token_ids": named}
    return {
        "index": 0, "text": text, "logprobs": None, "finish_reason": finish, stop_member: stop,
        "prompt_token_ids": None, "token_ids": named,
    }  # fmt: skip


class Chunks:
    """Splits an engine's stream into events and hands each on, decoded; `[DONE]` as None."""

    def __init__(self, take: Callable[[Json | None], None]) -> None:
        self._take = take
        self._held = b""
        self.pieces = 0

    def feed(self, piece: bytes) -> None:
        self.pieces += 1
        data = self._held + piece
        end = whole_events(data)
        self._held = data[end:]
        if len(self._held) > HELD_MAX:
            raise UpstreamError("protocol", "an event is longer than the router holds")
        for line in data[:end].splitlines():
            if line.startswith(b"data:"):
                self._take(_event(line[5:].strip()))


def _event(payload: bytes) -> Json | None:
    if payload == b"[DONE]":
        return None
    try:
        event = _decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UpstreamError("protocol", f"an event is not JSON: {error}") from None
    if not isinstance(event, dict):
        raise UpstreamError("protocol", "an event is not a JSON object")
    return event
