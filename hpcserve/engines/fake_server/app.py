"""Routes of the fake engine: OpenAI's, vLLM's, and /fake/fail."""

from __future__ import annotations

import hmac
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from ...http.server import Exchange, HttpError
from . import requests, responses, tokens
from .answers import StreamedAnswer, WholeAnswer
from .failures import Failures
from .flags import Flags
from .kv_cache import BlockPool
from .metrics import Metrics, text
from .puller import Puller
from .requests import Generation, RequestError
from .scheduler import Scheduler
from .sequence import Sequence

if TYPE_CHECKING:
    from .kv_events import KVEventPublisher

log = logging.getLogger(__name__)

VERSION = "0.32.0+fake"
_BODY_LIMIT = 64 << 20
_METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode
Json = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Engine:
    """The parts of a running fake engine."""

    flags: Flags
    pool: BlockPool
    metrics: Metrics
    failures: Failures
    scheduler: Scheduler
    puller: Puller | None
    events: KVEventPublisher | None
    draining: bool = False


class App:
    """Answers requests; `handle` is what the HTTP server calls."""

    def __init__(self, engine: Engine, *others: Engine) -> None:
        """With `others` there is one engine for each data-parallel rank."""
        self._engine = engine
        self._ranks = (engine, *others)
        self._created = int(time.time())
        self._key = None if engine.flags.api_key is None else b"Bearer " + engine.flags.api_key.encode()
        self._routes: dict[tuple[str, str], Callable[[Exchange], Awaitable[None]]] = {
            ("GET", "/health"): self._health,
            ("GET", "/ping"): self._health,
            ("POST", "/ping"): self._health,
            ("GET", "/version"): self._version,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/load"): self._load,
            ("GET", "/kv_event_sources"): self._kv_event_sources,
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/completions"): self._completions,
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/embeddings"): self._embeddings,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/detokenize"): self._detokenize,
            ("POST", "/reset_prefix_cache"): self._reset_prefix_cache,
            ("POST", "/fake/fail"): self._fail,
        }
        self._paths = {path for _, path in self._routes}

    async def handle(self, exchange: Exchange) -> None:
        try:
            await self._handle(exchange)
        except RequestError as error:
            exchange.respond(error.status, _encode(error.body(self._engine.flags.dialect)))
        except HttpError as error:
            exchange.fail_with(error)

    async def _handle(self, exchange: Exchange) -> None:
        failures = self._engine.failures
        on_command = not exchange.path.startswith("/fake/")
        if failures.hang and on_command:
            await exchange.closed
            return
        if not self._allowed(exchange):
            exchange.respond(401, _encode({"error": "Unauthorized"}))
            return
        if failures.refuse and on_command:
            raise RequestError("refused on command", status=503, kind="ServiceUnavailableError")
        route = self._routes.get((exchange.method, exchange.path))
        if route is None:
            known = exchange.path in self._paths
            phrase = "Method Not Allowed" if known else "Not Found"
            raise RequestError(phrase, status=405 if known else 404, kind=phrase)
        await route(exchange)

    def _allowed(self, exchange: Exchange) -> bool:
        # No path is open, /health neither: an agent must not take another run's engine for its own.
        if self._key is None:
            return True
        return hmac.compare_digest(exchange.header(b"authorization") or b"", self._key)

    async def _json(self, exchange: Exchange) -> Json:
        raw = await exchange.body(_BODY_LIMIT)
        try:
            body = _decode(raw)
        except msgspec.DecodeError as error:
            raise RequestError(f"JSON decode error: {error}", kind="Bad Request") from error
        if not isinstance(body, dict):
            raise RequestError("the body must be a JSON object", kind="Bad Request")
        return body

    # Generation.

    async def _completions(self, exchange: Exchange) -> None:
        await self._generate(exchange, requests.completion)

    async def _chat(self, exchange: Exchange) -> None:
        await self._generate(exchange, requests.chat)

    async def _generate(
        self, exchange: Exchange, parse: Callable[[Json, Flags, str | None], Generation]
    ) -> None:
        body = await self._json(exchange)
        engine = self._rank_of(exchange)
        if engine.draining:
            raise RequestError("Server is shutting down", status=503, kind="ServiceUnavailableError")
        request_id = exchange.header(b"x-request-id")
        try:
            generation = parse(body, engine.flags, request_id.decode("latin-1") if request_id else None)
        except RequestError:
            self._free_remote(engine, body.get("kv_transfer_params"))
            raise
        engine.failures.request_arrived()
        await self._answer(exchange, generation, engine)

    def _rank_of(self, exchange: Exchange) -> Engine:
        """The engine that a request names, or the one with the least to do."""
        named = exchange.header(b"x-data-parallel-rank")
        try:
            rank = None if named is None else int(named)
        except ValueError:
            # vLLM does not complain either (entrypoints/generate/base/serving.py).
            rank = None
        if rank is None:
            return min(self._ranks, key=lambda engine: engine.scheduler.unfinished)
        if not 0 <= rank < len(self._ranks):
            raise RequestError(f"data_parallel_rank {rank} is out of range [0, {len(self._ranks)}).")
        return self._ranks[rank]

    def _free_remote(self, engine: Engine, params: Any) -> None:
        """A refused request frees what prefill holds for it, as in vLLM."""
        if engine.puller is not None and isinstance(params, dict) and params.get("do_remote_prefill"):
            engine.puller.notify_params(params)

    async def _answer(self, exchange: Exchange, generation: Generation, engine: Engine) -> None:
        scheduler = engine.scheduler
        answer = self._open(exchange, generation, len(generation.prompts) * len(generation.samplings))
        sequences = self._sequences(generation, answer)
        for sequence in sequences:
            scheduler.submit(sequence)
        try:
            await answer.done
        finally:
            # Cancelled because the client has gone: its sequences stop now.
            for sequence in sequences:
                scheduler.abort(sequence)

    def _open(self, exchange: Exchange, generation: Generation, count: int) -> StreamedAnswer | WholeAnswer:
        flags = self._engine.flags
        details = flags.enable_prompt_tokens_details
        if not generation.stream:
            return WholeAnswer(exchange, generation, count, details=details)
        answer = StreamedAnswer(exchange, generation, count, details=details, interval=flags.stream_interval)
        answer.start()
        return answer

    def _sequences(self, generation: Generation, answer: StreamedAnswer | WholeAnswer) -> list[Sequence]:
        sequences: list[Sequence] = []
        now = time.monotonic()
        n = len(generation.samplings)
        for p, prompt in enumerate(generation.prompts):
            base = generation.request_id if generation.chat else f"{generation.request_id}-{p}"
            unique = f"{base}-{uuid.uuid4().hex[:8]}"
            for s, sampling in enumerate(generation.samplings):
                sequence = Sequence(
                    request_id=unique if n == 1 else f"{s}_{unique}",
                    model=self._engine.flags.served_name,
                    prompt=prompt,
                    sampling=sampling,
                    listener=answer,
                    now=now,
                    index=len(sequences),
                    kv_params=generation.kv_params,
                    cache_salt=generation.cache_salt,
                    speech=self._engine.flags.speech,
                )
                sequences.append(sequence)
        return sequences

    async def _embeddings(self, exchange: Exchange) -> None:
        body = await self._json(exchange)
        model = requests.check_model(body, self._engine.flags)
        prompts = requests.prompts_of(body.get("input"), "input")
        for ids in prompts:
            requests.check_length(len(ids), self._engine.flags)
        size = body.get("dimensions") or responses.EMBEDDING_SIZE
        request_id = f"embd-{uuid.uuid4().hex}"
        as_base64 = body.get("encoding_format") == "base64"
        answer = responses.embeddings(model, request_id, prompts, size, as_base64=as_base64)
        exchange.respond(200, _encode(answer))

    # About the engine.

    async def _health(self, exchange: Exchange) -> None:
        exchange.respond(200, b"")

    async def _version(self, exchange: Exchange) -> None:
        exchange.respond(200, _encode({"version": VERSION}))

    async def _metrics(self, exchange: Exchange) -> None:
        exchange.respond(200, self._metrics_text(), _METRICS_TYPE)

    def _metrics_text(self) -> bytes:
        return text(engine.metrics for engine in self._ranks)

    async def _load(self, exchange: Exchange) -> None:
        exchange.respond(
            200, _encode({"server_load": sum(engine.scheduler.unfinished for engine in self._ranks)})
        )

    async def _kv_event_sources(self, exchange: Exchange) -> None:
        found = {
            str(rank): engine.events.describe()
            for rank, engine in enumerate(self._ranks)
            if engine.events is not None
        }
        exchange.respond(200, _encode(found))

    async def _models(self, exchange: Exchange) -> None:
        exchange.respond(200, _encode(responses.models(self._engine.flags, self._created)))

    async def _tokenize(self, exchange: Exchange) -> None:
        body = await self._json(exchange)
        requests.check_model(body, self._engine.flags)
        if "messages" in body:
            text = requests.chat_text(body)
        elif isinstance(body.get("prompt"), str):
            text = body["prompt"]
        else:
            raise RequestError("prompt must be a text", param="prompt")
        ids = tokens.encode(text)
        strings = [tokens.decode((token,)) for token in ids] if body.get("return_token_strs") else None
        answer = {
            "count": len(ids),
            "max_model_len": self._engine.flags.max_model_len,
            "tokens": ids,
            "token_strs": strings,
        }
        exchange.respond(200, _encode(answer))

    async def _detokenize(self, exchange: Exchange) -> None:
        body = await self._json(exchange)
        ids = body.get("tokens")
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise RequestError("tokens must be a list of token ids", param="tokens")
        requests.check_token_ids(ids)
        exchange.respond(200, _encode({"prompt": tokens.decode(ids)}))

    async def _reset_prefix_cache(self, exchange: Exchange) -> None:
        for engine in self._ranks:
            if not engine.pool.clear():
                log.warning("Failed to reset prefix cache because some blocks are not freed yet")
            engine.scheduler.wake()
        exchange.respond(200, b"")

    async def _fail(self, exchange: Exchange) -> None:
        command = await self._json(exchange)
        try:
            self._engine.failures.apply(command)
        except ValueError as error:
            raise RequestError(str(error), param="mode") from error
        for engine in self._ranks:
            engine.scheduler.wake()
        exchange.respond(200, _encode({"mode": command["mode"]}))
