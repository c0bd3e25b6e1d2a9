"""What listens to a request's sequences and writes the HTTP answer: whole or as a stream of events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence as Items
from typing import Any

import msgspec

from ...http.server import Exchange
from . import responses
from .requests import Generation, RequestError
from .sequence import Output, Sequence

_encode = msgspec.json.Encoder().encode

_EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


def internal_error(told: str | None) -> RequestError:
    """What is answered when KV blocks did not arrive and may not be recomputed: vLLM does not say why."""
    return RequestError(told or "Internal server error", status=500, kind="InternalServerError")


class WholeAnswer:
    """Collects the ends of all sequences; `done` is set when the body was sent."""

    def __init__(
        self, exchange: Exchange, generation: Generation, count: int, *, details: bool, dialect: str = "vllm"
    ) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._exchange = exchange
        self._generation = generation
        self._created = int(time.time())
        self._details = details
        self._dialect = dialect
        self._ends: dict[int, tuple[Sequence, Output]] = {}
        self._count = count

    def on_output(self, sequence: Sequence, output: Output) -> None:
        if output.finish_reason is None:
            return
        self._ends[sequence.index] = (sequence, output)
        if len(self._ends) < self._count:
            return
        ordered = [self._ends[index] for index in sorted(self._ends)]
        finals = [output for _, output in ordered]
        broken = next((final for final in finals if final.finish_reason == "error"), None)
        if broken is not None:
            error = self._error(broken)
            self._exchange.respond(error.status, _encode(error.body(self._dialect)))
        else:
            answers = [sequence for sequence, _ in ordered]
            self._exchange.respond(200, _encode(self._body(answers, finals)))
        if not self.done.done():
            self.done.set_result(None)

    def _error(self, output: Output) -> RequestError:
        return internal_error(output.error)

    def _body(self, answers: Items[Sequence], finals: Items[Output]) -> dict[str, Any]:
        return responses.whole(self._generation, self._created, answers, finals, details=self._details)


class StreamedAnswer:
    """Writes an event every `interval` tokens; `done` is set when the stream has ended."""

    def __init__(
        self, exchange: Exchange, generation: Generation, count: int, *, details: bool, interval: int
    ) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._exchange = exchange
        self._generation = generation
        self._head = responses.chunk_head(generation, int(time.time()))
        self._open = count
        self._count = count
        self._produced = [0] * count
        self._offsets = [0] * count
        self._prompt_tokens = sum(len(ids) for ids in generation.prompts)
        self._introduced = False
        self._details = details
        self._interval = interval
        self._waiting: dict[int, Output] = {}

    def start(self) -> None:
        """Send the head; vLLM does so before the first token."""
        self._exchange.start(200, _EVENT_STREAM)

    def on_output(self, sequence: Sequence, output: Output) -> None:
        if self._open == 0:
            return
        if not self._exchange.started:
            self.start()
        if output.finish_reason == "error":
            self._end_with(internal_error(output.error).body())
            return
        if self._generation.chat:
            self._introduce()
        if self._interval > 1:
            gathered = self._gathered(sequence, output)
            if gathered is None:
                return
            output = gathered
        if output.tokens or output.finish_reason is not None:
            self._send_choice(sequence, output)
        if output.finish_reason is None:
            return
        self._open -= 1
        if self._open == 0:
            self._end(sequence.cached_tokens if self._details else None)

    def _gathered(self, sequence: Sequence, output: Output) -> Output | None:
        """The outputs since the last event as one; None until there are enough. The first and the last go
        out at once, as in vLLM."""
        waiting = self._waiting.pop(sequence.index, None)
        if waiting is not None:
            output = Output(
                text=waiting.text + output.text,
                tokens=waiting.tokens + output.tokens,
                finish_reason=output.finish_reason,
                stop_reason=output.stop_reason,
            )
        ends = output.finish_reason is not None
        if ends or self._produced[sequence.index] == 0 or len(output.tokens) >= self._interval:
            return output
        self._waiting[sequence.index] = output
        return None

    def _introduce(self) -> None:
        """A chat stream's first chunks: the role, and the echoed message."""
        if self._introduced:
            return
        self._introduced = True
        generation = self._generation
        prompt = generation.prompts[0] if generation.return_token_ids else None
        extra = {"prompt_token_ids": prompt, "prompt_text": None}
        for index in range(self._count):
            self._send([responses.role_choice(index)], 0, extra)
        if generation.echo:
            for index in range(self._count):
                self._send([responses.echo_choice(index, generation.echo)], 0, {})

    def _send_choice(self, sequence: Sequence, output: Output) -> None:
        generation, index = self._generation, sequence.index
        if generation.chat:
            choice = responses.chat_chunk_choice(generation, sequence, output)
        else:
            first = self._produced[index] == 0
            offset = self._offsets[index]
            choice = responses.completion_chunk_choice(generation, sequence, output, offset, first=first)
            if choice["logprobs"] is not None:
                texts = choice["logprobs"]["tokens"]
                self._offsets[index] = offset + sum(map(len, texts))
        self._produced[index] += len(output.tokens)
        self._send([choice], self._produced[index], {})

    def _send(self, choices: Items[dict[str, Any]], produced: int, extra: dict[str, Any]) -> None:
        chunk = {**self._head, "choices": choices}
        if self._generation.continuous_usage:
            generation = self._generation
            prompt = generation.prompts[choices[0]["index"] // len(generation.samplings)]
            chunk["usage"] = responses.usage(len(prompt), produced)
        chunk.update(extra)
        self._exchange.write(b"data: " + _encode(chunk) + b"\n\n")

    def _end(self, cached: int | None) -> None:
        if self._generation.include_usage:
            numbers = responses.short_usage(self._prompt_tokens, sum(self._produced), cached)
            chunk = {**self._head, "choices": [], "usage": numbers}
            self._exchange.write(b"data: " + _encode(chunk) + b"\n\n")
        self._finish()

    def _end_with(self, error: dict[str, Any]) -> None:
        self._open = 0
        self._exchange.write(b"data: " + _encode(error) + b"\n\n")
        self._finish()

    def _finish(self) -> None:
        self._exchange.write(b"data: [DONE]\n\n")
        self._exchange.finish()
        if not self.done.done():
            self.done.set_result(None)
