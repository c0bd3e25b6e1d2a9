"""The fake engine in SGLang's dialect (0.5.23): its routes, rooms, errors and metrics."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import msgspec

from ...http.server import Exchange
from . import requests, tokens
from .answers import StreamedAnswer, WholeAnswer
from .app import App, Engine
from .flags import Flags
from .requests import Generation, Json, RequestError
from .rooms import Rooms
from .sequence import Listener, Output, Sequence
from .sglang_answers import SGLangStream, SGLangWhole
from .side_channel import WireError

_encode = msgspec.json.Encoder().encode

_MB = 1 << 20
# vLLM's name, as `metrics.py` has it -> SGLang's (observability/metrics_collector.py).
_METRICS = {
    "num_requests_running": "num_running_reqs",
    "num_requests_waiting": "num_queue_reqs",
    "kv_cache_usage_perc": "token_usage",
    "prompt_tokens_total": "prompt_tokens_total",
    "prompt_tokens_cached_total": "cached_tokens_total",
    "generation_tokens_total": "generation_tokens_total",
    "time_to_first_token_seconds_sum": "time_to_first_token_seconds_sum",
    "time_to_first_token_seconds_count": "time_to_first_token_seconds_count",
    "inter_token_latency_seconds_sum": "inter_token_latency_seconds_sum",
    "inter_token_latency_seconds_count": "inter_token_latency_seconds_count",
    "e2e_request_latency_seconds_sum": "e2e_request_latency_seconds_sum",
    "e2e_request_latency_seconds_count": "e2e_request_latency_seconds_count",
    "nixl_num_failed_transfers_total": "num_transfer_failed_reqs_total",
    "nixl_bytes_transferred_sum": "kv_transfer_total_mb_sum",
    "nixl_bytes_transferred_count": "kv_transfer_total_mb_count",
}
_CHAT = "/v1/chat/completions"
_SAMPLE = re.compile(r"vllm:(\w+)(\{.*\}) (\S+)")


class SGLangApp(App):
    """Answers as SGLang does; on prefill and decode engines, in the room that the request names."""

    def __init__(self, engine: Engine, rooms: Rooms | None) -> None:
        super().__init__(engine)
        self._rooms = rooms
        self._routes[("GET", "/ready")] = self._ready
        self._paths.add("/ready")

    async def _ready(self, exchange: Exchange) -> None:
        exchange.respond(503 if self._engine.draining else 200, b"")

    def _metrics_text(self) -> bytes:
        lines = []
        for line in super()._metrics_text().decode().splitlines():
            match = _SAMPLE.fullmatch(line)
            if match is not None and match[1] in _METRICS:
                value = float(match[3]) / (_MB if match[1] == "nixl_bytes_transferred_sum" else 1)
                lines.append(f"sglang:{_METRICS[match[1]]}{match[2]} {value}")
        return ("\n".join(lines) + "\n").encode()

    async def _generate(
        self, exchange: Exchange, parse: Callable[[dict[str, Any], Flags, str | None], Generation]
    ) -> None:
        def meeting(body: dict[str, Any], flags: Flags, request_id: str | None) -> Generation:
            if flags.role == "prefill":
                # Whatever is asked for, prefill ends with the first token.
                body = {**body, "max_tokens": 1, "max_completion_tokens": 1, "min_tokens": 0}
            if body.get("stream") and body.get("return_token_ids") and exchange.path == _CHAT:
                raise RequestError(
                    "return_token_ids is not supported with streaming on /v1/chat/completions. Please set"
                    " stream=false when using return_token_ids=true.",
                    kind="BadRequest",
                )
            generation = parse({**body, "kv_transfer_params": _params(body, flags)}, flags, request_id)
            if flags.disaggregated and body.get("bootstrap_room") is None:
                raise RequestError(
                    "Invalid request: Disaggregated request received without bootstrap room id."
                    f" req.rid='{generation.request_id}'",
                    kind="BadRequest",
                )
            return generation

        await super()._generate(exchange, meeting)

    def _open(self, exchange: Exchange, generation: Generation, count: int) -> StreamedAnswer | WholeAnswer:
        flags = self._engine.flags
        details = flags.enable_prompt_tokens_details
        if not generation.stream:
            return SGLangWhole(exchange, generation, count, details=details, dialect="sglang")
        # The head goes out with the first token.
        return SGLangStream(exchange, generation, count, details=details, interval=flags.stream_interval)

    async def _answer(self, exchange: Exchange, generation: Generation, engine: Engine) -> None:
        try:
            await super()._answer(exchange, generation, engine)
        finally:
            if self._rooms is not None and generation.kv_params:
                self._rooms.leave(generation.kv_params["room"])

    def _sequences(self, generation: Generation, answer: StreamedAnswer | WholeAnswer) -> list[Sequence]:
        sequences = super()._sequences(generation, answer)
        params = generation.kv_params
        for sequence in sequences:
            sequence.holds_stops = False
        for sequence in sequences if params else ():
            assert params is not None
            if self._rooms is not None:
                sequence.listener = _HandedOver(self._rooms, params["room"], sequence.request_id, answer)
                sequence.request_id = params["room"]
            else:
                sequence.kv_params = {**params, "remote_num_tokens": sequence.prompt_length}
        return sequences

    async def _tokenize(self, exchange: Exchange) -> None:
        body = await self._json(exchange)
        text = requests.chat_text(body) if "messages" in body else body.get("prompt")
        if not isinstance(text, str):
            raise RequestError("Exactly one of 'prompt' or 'messages' must be provided.")
        ids, most = tokens.encode(text), self._engine.flags.max_model_len
        exchange.respond(200, _encode({"tokens": ids, "count": len(ids), "max_model_len": most}))

    async def _detokenize(self, exchange: Exchange) -> None:
        body = await self._json(exchange)
        ids = body.get("tokens")
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise RequestError("Invalid tokens type. Expected List[int].")
        special = not body.get("skip_special_tokens", True)
        text = tokens.decode(requests.check_token_ids(ids), special=special)
        exchange.respond(200, _encode({"text": text}))


def _params(body: Json, flags: Flags) -> dict[str, Any] | None:
    """A transfer in the scheduler's words."""
    if not flags.disaggregated or body.get("bootstrap_room") is None:
        return None
    return {
        "do_remote_decode": flags.role == "prefill",
        "do_remote_prefill": flags.role == "decode",
        "room": str(body["bootstrap_room"]),
        "bootstrap_host": body.get("bootstrap_host"),
        "bootstrap_port": body.get("bootstrap_port") or flags.bootstrap_port,
    }


class _HandedOver:
    """Tells the end of a prefill when decode has its blocks, as SGLang does, or why it has not."""

    def __init__(self, rooms: Rooms, room: str, rid: str, listener: Listener) -> None:
        self._rooms = rooms
        self._room = room
        self._rid = rid
        self._listener = listener
        self._task: asyncio.Task[None] | None = None

    def on_output(self, sequence: Sequence, output: Output) -> None:
        if output.finish_reason not in ("stop", "length"):
            self._listener.on_output(sequence, output)
            return
        self._task = asyncio.get_running_loop().create_task(self._wait(sequence, output))

    async def _wait(self, sequence: Sequence, output: Output) -> None:
        try:
            await self._rooms.hand_over(self._room, self._rid)
        except WireError as error:
            output = Output(text="", tokens=(), finish_reason="error", error=str(error))
        self._listener.on_output(sequence, output)
