"""The fake engine in TensorRT-LLM's dialect (1.2): its routes, halves of requests, errors and metrics.

What differs on purpose: the state that a context server gives away must come back unchanged, which a real one
does not check, and KV blocks go over the side channel of this engine.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Any

import msgspec

from ...http.server import Exchange
from . import context_requests, requests
from .answers import StreamedAnswer, WholeAnswer
from .app import App, Engine
from .flags import Flags
from .requests import Generation, RequestError
from .sequence import Output, Sequence, Work
from .side_channel import SideChannel

_encode = msgspec.json.Encoder().encode

Json = dict[str, Any]
_ROUTES = frozenset({"/health", "/version", "/metrics", "/v1/models", "/v1/completions", "/fake/fail"})
_CHAT = "/v1/chat/completions"
TRANSFER_FAILED = "Error in kv cache transfer for generation requests"
_MOST_ITERATIONS = 1000


class ContextApp(App):
    """Answers as TensorRT-LLM does."""

    def __init__(self, engine: Engine, side_channel: SideChannel | None) -> None:
        super().__init__(engine)
        self._side_channel = side_channel
        self._numbers = itertools.count(2048)
        self._iterations: deque[Json] = deque(maxlen=_MOST_ITERATIONS)
        engine.scheduler.on_step = self._note
        self._routes = {key: route for key, route in self._routes.items() if key[1] in {*_ROUTES, _CHAT}}
        self._routes[("GET", "/fake/load")] = self._fake_load
        self._paths = {path for _, path in self._routes}

    # Halves of requests.

    async def _generate(
        self, exchange: Exchange, parse: Callable[[Json, Flags, str | None], Generation]
    ) -> None:
        def half(body: Json, flags: Flags, request_id: str | None) -> Generation:
            chat = exchange.path == _CHAT
            context_requests.check(body, chat=chat)
            params = context_requests.kv_params(body, flags)
            generation = parse({**_counted(body), "kv_transfer_params": params}, flags, request_id)
            if chat and body.get("prompt_token_ids"):
                ids = requests.check_token_ids(body["prompt_token_ids"])
                generation = replace(generation, prompts=(ids,))
            if params is not None and params.get("do_remote_decode"):
                one = tuple(replace(each, max_tokens=1) for each in generation.samplings)
                params["asked"] = generation.samplings[0].max_tokens
                generation = replace(generation, samplings=one)
            return generation

        await super()._generate(exchange, half)

    def _open(self, exchange: Exchange, generation: Generation, count: int) -> StreamedAnswer | WholeAnswer:
        if not generation.stream:
            return _Whole(
                exchange, generation, count, details=True, dialect="tensorrt-llm", number=next(self._numbers)
            )
        interval = self._engine.flags.stream_interval
        answer = _Streamed(exchange, generation, count, details=True, interval=interval)
        answer.start()
        return answer

    def _sequences(self, generation: Generation, answer: StreamedAnswer | WholeAnswer) -> list[Sequence]:
        sequences = super()._sequences(generation, answer)
        for sequence in sequences:
            sequence.given = tuple(sequence.kv_params.get("first", ()))
        return sequences

    # About the engine.

    def _note(self, work: Items[Work], seconds: float) -> None:
        """A step was made."""
        scheduler, flags = self._engine.scheduler, self._engine.flags
        used = round(scheduler.cache_usage * flags.kv_blocks)
        prompts = [item for item in work if not item.decode]
        self._iterations.append(
            {
                "iterLatencyMS": seconds * 1000,
                "numActiveRequests": scheduler.running + scheduler.loading,
                "numQueuedRequests": scheduler.waiting_for_capacity,
                "kvCacheStats": {
                    "maxNumBlocks": flags.kv_blocks,
                    "usedNumBlocks": used,
                    "freeNumBlocks": flags.kv_blocks - used,
                    "tokensPerBlock": flags.block_size,
                },
                "inflightBatchingStats": {
                    "numContextRequests": len(prompts),
                    "numGenRequests": len(work) - len(prompts),
                    "numCtxTokens": sum(item.count for item in prompts),
                },
            }
        )

    async def _metrics(self, exchange: Exchange) -> None:
        told = list(self._iterations)
        self._iterations.clear()
        exchange.respond(200, _encode(told))

    async def _models(self, exchange: Exchange) -> None:
        card = {
            "id": self._engine.flags.served_name,
            "object": "model",
            "created": self._created,
            "owned_by": "tensorrt_llm",
        }
        exchange.respond(200, _encode({"object": "list", "data": [card]}))

    async def _fake_load(self, exchange: Exchange) -> None:
        """What no metric tells: requests, also those that wait for KV, and prompts kept for decode."""
        held = 0 if self._side_channel is None else self._side_channel.held
        exchange.respond(200, _encode({"unfinished": self._engine.scheduler.unfinished, "held": held}))


def _counted(body: Mapping[str, Any]) -> Json:
    """With `stream_options` as they are by default: they count, and in each event."""
    options = body.get("stream_options")
    if options is None:
        return dict(body)
    return {**body, "stream_options": {"include_usage": True, "continuous_usage_stats": True, **options}}


class _Whole(WholeAnswer):
    """An answer in one piece; to `context_only`, with what the other half needs."""

    def __init__(self, *parts: Any, number: int, **more: Any) -> None:
        super().__init__(*parts, **more)
        self._number = number

    def _error(self, output: Output) -> RequestError:
        return RequestError(TRANSFER_FAILED)

    def _body(self, answers: Items[Sequence], finals: Items[Output]) -> Json:
        whole = super()._body(answers, finals)
        body = {name: whole[name] for name in ("id", "object", "created", "model", "usage")}
        pairs = zip(whole["choices"], answers, strict=True)
        body["choices"] = [self._choice(choice, answer) for choice, answer in pairs]
        half = (self._generation.kv_params or {}).get("do_remote_decode")
        body["prompt_token_ids"] = self._generation.prompts[0] if half else None
        return body

    def _choice(self, choice: Json, answer: Sequence) -> Json:
        asked = answer.kv_params.get("asked")
        if asked is not None:
            first = answer.output_tokens
            choice["disaggregated_params"] = context_requests.sealed(
                answer.result_kv_params, first, self._number
            )
            if choice["finish_reason"] == "length" and asked > 1:
                choice["finish_reason"] = "not_finished"
        else:
            choice["disaggregated_params"] = None
        for name in ("prompt_logprobs", "prompt_token_ids", "routed_experts"):
            choice.pop(name, None)
        if "message" in choice:
            message = choice["message"]
            said = {"role": message["role"], "content": message["content"]}
            choice["message"] = {**said, "reasoning_content": None, "reasoning": None, "tool_calls": []}
        return choice


class _Streamed(StreamedAnswer):
    """A stream of events without nulls, which breaks off where TensorRT-LLM raises."""

    def _send(self, choices: Items[Json], produced: int, extra: Json) -> None:
        super()._send([_without_nulls(choice) for choice in choices], produced, {})

    def _end_with(self, error: Json) -> None:
        self._open = 0
        self._exchange.abort()
        if not self.done.done():
            self.done.set_result(None)


def _without_nulls(choice: Json) -> Json:
    return {name: value for name, value in choice.items() if value is not None}
