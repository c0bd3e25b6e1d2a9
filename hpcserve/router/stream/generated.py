"""A stream of generated text: what the client has had of it, and what the engine said besides.

Nearly every event is one token, and goes by without being decoded. The places looked for are those of
vLLM's chunks (0.32, entrypoints/openai/*/protocol.py: the order of the fields is that of the classes).
Inside an answer's text quotes are escaped, so none of the marks can be part of it. An event that looks
different is decoded, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from .asked import Asked
from .events import HELD_MAX, Held, first_event

Json = dict[str, Any]

_END = b"\n\n"
_DONE = b"data: [DONE]\n\n"
_IDS = b'"token_ids":['
_PROMPT_IDS = b'"prompt_token_ids":['
_ONGOING = b'"finish_reason":null'
_CHAT_TEXT = b'"delta":{"content":"'
SGLANG_CHAT_TEXT = b'"delta":{"reasoning_content":null,"content":"'
"""In SGLang's chunks (0.5.23, srt/entrypoints/openai/sse_utils.py); what follows the text is as in vLLM's."""
_CHAT_CLOSE = b'"},"logprobs":'
_TEXT = b'"text":"'
_CLOSE = b'","logprobs":'

GIVEN_UP = b'"finish_reason":"abort"'
"""In an answer that an engine gave up because it stops."""


class _Choice(msgspec.Struct, gc=False):
    """The parts of a choice that count."""

    delta: Any = None
    text: Any = None
    finish_reason: Any = None
    token_ids: Any = None


class Chunk(msgspec.Struct, gc=False):
    """The parts of an event that count."""

    choices: list[_Choice] | None = None
    usage: Any = None
    error: Any = None


_decode = msgspec.json.Decoder().decode
_decode_chunk = msgspec.json.Decoder(Chunk).decode
_encode = msgspec.json.Encoder().encode


class EngineFault(Exception):
    """The engine ended the stream with an error event, or because it stops; the event was not passed on."""

    def __init__(self, message: str, *, status: int, event: bytes | None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.event = event
        """The error as the engine put it; None for an answer it just gave up."""


def given_up() -> EngineFault:
    return EngineFault("the engine gave up its answers", status=503, event=None)


def marks_of(chat: bool) -> tuple[bytes, bytes]:
    """What a usual event has before its text, and after it."""
    return (_CHAT_TEXT, _CHAT_CLOSE) if chat else (_TEXT, _CLOSE)


class GeneratedStream:
    """Hands an engine's events to `write`, less what the client did not ask for, and keeps account."""

    __slots__ = (
        "_close", "_held", "_keep_ids", "_mark", "_on_prompt_ids", "_write", "chat", "done", "events",
        "finished", "has_error", "head", "ids", "introduced", "pieces", "plain", "prompt_ids", "reached",
        "single", "steady", "text", "usage", "wants_ids", "wants_usage",
    )  # fmt: skip

    def __init__(
        self,
        write: Callable[[bytes], None],
        asked: Asked,
        *,
        chat: bool,
        on_prompt_ids: Callable[[bytes], bool] | None = None,
    ) -> None:
        """`on_prompt_ids` gets the ids of the prompt's tokens, as in the JSON array and without its brackets;
        it says whether they shall be kept."""
        self._write = write
        self._on_prompt_ids = on_prompt_ids
        self._keep_ids = asked.wants_ids
        self._mark, self._close = marks_of(chat)
        self._held = Held()
        self.chat = chat
        self.wants_ids = asked.wants_ids
        self.wants_usage = asked.wants_usage
        self.head = b""
        """The start of each event's object, up to its choices: id, creation time and model."""
        self.text = bytearray()
        """All text the client has had, escaped as in JSON."""
        self.ids = bytearray()
        """The ids of the tokens the engine generated, a comma after each."""
        self.reached = 0
        """Length of `ids` after the last event that had text: what came later is not in any text yet."""
        self.single = False
        """That event had one token, so its text ends where the token does."""
        self.prompt_ids: bytes | None = None
        self.plain = True
        """All the client has had is text: no tool calls, no reasoning."""
        self.introduced = False
        """The client has had an event, if only the one that names the role."""
        self.finished = False
        """The client knows why the answer ends."""
        self.done = False
        self.has_error = False
        """The engine refused to go on, and told the client."""
        self.usage: Json | None = None
        self.events = 0
        """Events with tokens."""
        self.pieces = 0
        self.steady = False
        """The last event was a usual one."""

    def write_to(self, write: Callable[[bytes], None]) -> None:
        self._write = write

    def prompt_ids_to(self, on_prompt_ids: Callable[[bytes], bool]) -> None:
        self._on_prompt_ids = on_prompt_ids

    @property
    def marks(self) -> tuple[bytes, bytes]:
        """What a usual event has before its text, and after it."""
        return self._mark, self._close

    @property
    def whole(self) -> bool:
        """Nothing is held back that waits for the rest of an event."""
        return not self._held.size

    @property
    def tokens(self) -> int:
        return self.ids.count(b",")

    def sent(self) -> str:
        """The text the client has had."""
        text: str = _decode(b'"' + bytes(self.text) + b'"')
        return text

    def feed(self, piece: bytes) -> None:
        """Take a piece of the engine's body. Raises EngineFault."""
        self.pieces += 1
        held = self._held
        if not held.size and 0 < piece.find(b"\n") == len(piece) - 2 and piece.endswith(_END):
            out = self._event(piece)
            if out:
                self._write(out)
            return
        whole = held.cut(piece)
        if held.size > HELD_MAX:
            raise EngineFault("an event is longer than the router holds", status=502, event=None)
        if whole:
            self._several(whole)

    def _several(self, data: bytes) -> None:
        out = []
        start = 0
        try:
            while start < len(data):
                end = first_event(data, start)
                event = data[start:end]
                start = end
                out.append(self._event(event))
        finally:
            # What came before a fault is the client's.
            if rest := b"".join(out):
                self._write(rest)

    def end(self) -> None:
        """The engine's stream is whole."""
        if self._held.size:
            self._write(self._held.take())

    def drop_half(self) -> None:
        """The engine's stream broke: forget the start of an event that will not come."""
        self._held.take()

    def _event(self, event: bytes) -> bytes:
        if event == _DONE:
            self.done = True
            return event
        if not self.introduced or event.find(_ONGOING) < 0:
            return self._unusual(event)
        at = event.find(_IDS)
        size = len(self._mark)
        start = event.find(self._mark) + size
        stop = event.find(self._close, start, at if at > 0 else len(event))
        if stop <= 0 or start < size or event.find(_ONGOING, stop, at if at > 0 else len(event)) <= 0:
            return self._unusual(event)
        self.events += 1
        self.steady = True
        self.text += event[start:stop]
        if at < 0:
            # No ids were asked for: text is all there is to count.
            return event
        end = event.find(b"]", at)
        ids = event[at + 13 : end]
        self.ids += ids
        self.ids += b","
        if stop > start:
            self.reached = len(self.ids)
            self.single = b"," not in ids
        return event if self._keep_ids else event[: at + 12] + b"null" + event[end + 1 :]

    # Events that are decoded: the first, the last, and those of other engines.

    def _unusual(self, event: bytes) -> bytes:
        self.steady = False
        if not event.startswith(b"data: {"):
            if not event.startswith(b"data:"):
                return event
            if event[5:12].strip().startswith(b"[DONE]"):
                self.done = True
                return event
        event = self._without_prompt(event)
        try:
            chunk = _decode_chunk(event[5:])
        except (msgspec.DecodeError, UnicodeDecodeError):
            loose = loosely(event[5:])
            if loose is None:
                self.introduced, self.plain = True, False
                return event
            chunk = loose
        if chunk.error is not None:
            fault = fault_of(chunk.error, event)
            if fault.status >= 500:
                raise fault
            # The request is to blame, and would fare no better elsewhere.
            self.has_error = self.finished = True
            return event
        if not chunk.choices:
            if chunk.usage is not None:
                self.usage = chunk.usage
                return event if self.wants_usage else b""
            return event
        if not self.head and (place := event.find(b'"choices":')) > 0:
            self.head = event[5:place].lstrip()
        for choice in chunk.choices:
            self._choice(choice)
        if self.chat and event.find(SGLANG_CHAT_TEXT) > 0:
            self._mark = SGLANG_CHAT_TEXT
        self.introduced = True
        return event if self._keep_ids else without_ids(event)

    def _without_prompt(self, event: bytes) -> bytes:
        """Take the prompt's ids out before decoding: there can be tens of thousands."""
        at = event.find(_PROMPT_IDS)
        if at < 0:
            return event
        end = event.find(b"]", at)
        raw = event[at + len(_PROMPT_IDS) : end]
        if self._on_prompt_ids is not None and self._on_prompt_ids(raw):
            self.prompt_ids = raw
        if self._keep_ids:
            return event
        return event[: at + len(_PROMPT_IDS) - 1] + b"null" + event[end + 1 :]

    def _choice(self, choice: _Choice) -> None:
        reason, text = choice.finish_reason, choice.text
        if reason == "abort":
            raise given_up()
        if self.chat:
            text = None
            delta = choice.delta
            if isinstance(delta, dict):
                text = delta.get("content")
                for key, value in delta.items():
                    if value and key != "content" and key != "role":
                        self.plain = False
        ids: Any = choice.token_ids or ()
        if len(ids) == 1 and type(ids[0]) is int:
            self.ids += b"%d," % ids[0]
        elif ids:
            self.ids += ",".join(map(str, ids)).encode() + b","
        if ids or text:
            self.events += 1
        if text:
            self.text += _encode(text)[1:-1]
            self.reached = len(self.ids)
            self.single = len(ids) == 1
        if reason is not None:
            self.finished = True


def loosely(data: bytes) -> Chunk | None:
    """What counts of an event in a form of its own; None where it is no object."""
    try:
        chunk = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if not isinstance(chunk, dict):
        return None
    choices = chunk.get("choices")
    found = None
    if choices:
        given = choices if isinstance(choices, list) else ()
        found = [
            _Choice(*[choice.get(name) for name in _Choice.__struct_fields__])
            for choice in given
            if isinstance(choice, dict)
        ]
        found = found or [_Choice()]
    return Chunk(found, chunk.get("usage"), chunk.get("error"))


def without_ids(event: bytes) -> bytes:
    """With `null` for each list of tokens: what the engine writes where it is not asked for them."""
    at = event.find(_IDS)
    while at > 0:
        end = event.find(b"]", at)
        event = event[: at + len(_IDS) - 1] + b"null" + event[end + 1 :]
        at = event.find(_IDS, at)
    return event


def fault_of(error: object, event: bytes) -> EngineFault:
    fields = error if isinstance(error, dict) else {}
    code = fields.get("code")
    status = code if type(code) is int and 400 <= code < 600 else 500
    return EngineFault(
        str(fields.get("message") or "the engine reported an error"), status=status, event=event
    )
