"""A stream that is run again from its start: what the client has had is swallowed, the rest is passed on."""

from __future__ import annotations

from typing import Any

import msgspec

from ...http.response import UpstreamResponse
from ..stream.asked import Asked
from ..stream.generated import GeneratedStream
from .chunks import CannotGoOn, Chunks, Json
from .resumed import Client

_REFUSAL_MAX = 1024 * 1024


class Replayed:
    """The delivery of a client's own request for the second time.

    Raises CannotGoOn where the text differs from what the client has had.
    """

    def __init__(self, client: Client, before: GeneratedStream, asked: Asked) -> None:
        self._client = client
        self._before = before
        self._left = before.sent()
        self._skip = before.tokens
        """Tokens whose ids or log probabilities the client has had."""
        self._introduced = before.introduced
        self._own = GeneratedStream(self._chunk_bytes, asked, chat=before.chat)
        self._own.prompt_ids = before.prompt_ids
        self._events = Chunks(self._take)
        self._named = msgspec.json.decode(before.head + b'"choices":[]}') if before.head else {}
        self.started = False

    @property
    def pieces(self) -> int:
        return self._own.pieces

    async def deliver(self, response: UpstreamResponse, first: bytes) -> None:
        if response.status != 200:
            body = first + await response.read(_REFUSAL_MAX)
            raise CannotGoOn(f"the engine answered {response.status}: {body[:200].decode(errors='replace')}")
        await self._client.carry(response, first, self._own.feed)
        if self._left:
            raise CannotGoOn("the answer is another one this time")

    def _chunk_bytes(self, data: bytes) -> None:
        self._events.feed(data)

    def _take(self, event: Json | None) -> None:
        if event is None:
            if not self._left:
                self._client.write(b"data: [DONE]\n\n")
            return
        choices = event.get("choices")
        if choices:
            choice = self._rest_of(choices[0])
            if choice is None:
                return
            event["choices"] = [choice]
        elif self._left:
            return
        event |= {key: value for key, value in self._named.items() if key != "choices"}
        if not self.started:
            # From here this engine's account is the stream's.
            self.started = True
            self._own.head = self._before.head or self._own.head
            self._client.stream = self._own
        self._client.write(b"data: " + msgspec.json.encode(event) + b"\n\n")

    def _rest_of(self, choice: Json) -> Json | None:
        """The part of a choice that the client has not had; None when it had all."""
        holder, key = (choice.get("delta") or {}, "content") if self._own.chat else (choice, "text")
        if "role" in holder:
            if self._introduced:
                return None
            self._introduced = True
            return choice
        text: Any = holder.get(key) or ""
        tokens = _tokens(choice)
        if self._skip and tokens:
            had = min(self._skip, tokens)
            self._skip -= had
            _trim(choice, had)
            tokens -= had
        if self._left:
            common = min(len(text), len(self._left))
            if text[:common] != self._left[:common]:
                raise CannotGoOn("the answer is another one this time")
            self._left = self._left[common:]
            if self._left and choice.get("finish_reason") is not None:
                raise CannotGoOn("the answer ends earlier this time")
            text = text[common:]
            holder[key] = text
        if not text and not tokens and choice.get("finish_reason") is None and not self.started:
            return None
        return choice


def _tokens(choice: Json) -> int:
    ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
    if ids:
        return len(ids)
    if isinstance(logprobs, dict):
        return len(logprobs.get("content") or logprobs.get("tokens") or ())
    return 0


def _trim(choice: Json, had: int) -> None:
    """Leave the first tokens out of a choice's lists."""
    if choice.get("token_ids"):
        choice["token_ids"] = choice["token_ids"][had:]
    logprobs = choice.get("logprobs")
    if isinstance(logprobs, dict):
        choice["logprobs"] = {
            key: value[had:] if isinstance(value, list) else value for key, value in logprobs.items()
        }
