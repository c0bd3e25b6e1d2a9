"""Goes on with a client's stream when the worker that wrote it is lost.

In the middle of an answer its tokens so far are the prompt of the rest. What has state beyond its tokens
is run again from the start where that must give the same text, and what the client had is swallowed. All
else ends with an error event: never with text twice, and never as if it were whole.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Collection
from typing import Protocol

import msgspec

from ...engines.base import Engine
from ...http.bearer import bearer
from ...http.client import Pool
from ...http.errors import HttpError
from .. import choices
from ..call import Call
from ..demand import Demand
from ..legs import Delivery, EngineAnswer, LegFailure
from ..metrics import Metrics
from ..stream.asked import Asked, Fields
from ..stream.generated import GeneratedStream
from ..workers import Worker
from .chunks import CannotGoOn, Json, chunk, text_choice
from .replayed import Replayed
from .resumed import Client, Resumed
from .tokens import Engines, cut

log = logging.getLogger(__name__)

MOST = 3
"""Migrations of one stream."""


class Attempt(Protocol):
    """Runs a request on workers that are not in `avoid`, over one leg or two."""

    def __call__(
        self, target: str, body: Fields, demand: Demand, delivery: Delivery, avoid: Collection[Worker]
    ) -> Awaitable[object]: ...


class Migrator:
    """One per router process."""

    def __init__(
        self,
        engine: Engine,
        pool: Pool,
        metrics: Metrics,
        job_key: str | None,
    ) -> None:
        self.engine = engine
        self._metrics = metrics
        self.engines = Engines(pool, engine, bearer(job_key))

    async def go_on(
        self,
        call: Call,
        body: Fields,
        demand: Demand,
        client: Client,
        asked: Asked,
        failure: LegFailure,
        attempt: Attempt,
    ) -> None:
        """Bring `client`'s stream to its end after `failure`. `body` is what its engine was asked.

        Raises LegFailure when that is not possible; its message says why.
        """
        way = _Way(self, call, body, demand, client, asked, attempt)
        lost: set[Worker] = set()
        for _ in range(MOST):
            lost.add(failure.worker)
            call.migrations += 1
            reason = failure.fault
            try:
                result = await way.take(lost)
            except LegFailure as another:
                self._metrics.migrations.add(("result", "broken_again"), ("reason", reason))
                failure = another
                continue
            except (CannotGoOn, HttpError, EngineAnswer) as error:
                self._metrics.migrations.add(("result", "failed"), ("reason", reason))
                failure.message += f"; no other replica could go on with the answer: {error}"
                raise failure from error
            self._metrics.migrations.add(("result", result), ("reason", reason))
            log.info("the stream of %s was %s after: %s", call.request_id, result, failure.message)
            return
        failure.message += f"; the answer went on elsewhere {MOST} times before"
        raise failure


class _Way:
    """The ways one stream can go on."""

    def __init__(
        self,
        migrator: Migrator,
        call: Call,
        body: Fields,
        demand: Demand,
        client: Client,
        asked: Asked,
        attempt: Attempt,
    ) -> None:
        self._migrator = migrator
        self._engine = migrator.engine
        self._call = call
        self._fields = body
        self._demand = demand
        self._client = client
        self._asked = asked
        self._attempt = attempt
        self._prompt: bytes | None = None
        self._json: Json = msgspec.json.decode(msgspec.json.encode(body))
        self._single = len(choices.split(self._json, chat="messages" in self._json)) == 1

    async def take(self, lost: Collection[Worker]) -> str:
        """Go on somewhere that is not in `lost`; says how."""
        stream = self._client.stream
        assert stream is not None
        stream.drop_half()
        if stream.finished:
            return self._complete(stream)
        if not stream.text and stream.plain and self._single:
            await self._replay(stream, lost)
            return "restarted"
        obstacle = self._engine.resume_obstacle(self._json, stream.sent())
        if obstacle is None and not self._single:
            obstacle = "an answer of several choices"
        if obstacle is None and not stream.plain:
            obstacle = "an answer that is more than text"
        if obstacle is None and not stream.ids:
            obstacle = "tokens that the engine did not name"
        if obstacle is None and stream.wants_ids and stream.reached < len(stream.ids):
            obstacle = "tokens that the client has had without their text"
        if obstacle is None:
            try:
                await self._resume(stream, lost)
                return "resumed"
            except CannotGoOn as error:
                if self._client.stream is stream and self._repeatable(stream):
                    log.warning("a stream can't be resumed (%s); its request runs again", error)
                else:
                    raise
        elif not self._repeatable(stream):
            raise CannotGoOn(f"{obstacle} can't be resumed in the middle")
        await self._replay(stream, lost)
        return "replayed"

    def _repeatable(self, stream: GeneratedStream) -> bool:
        """The same request gives the same text."""
        return self._json.get("temperature") == 0 and stream.plain and self._single

    def _complete(self, stream: GeneratedStream) -> str:
        """The client has the answer and its reason to end; only the closing events are missing."""
        if stream.wants_usage and stream.usage is None and stream.prompt_ids is not None:
            prompt, answer = stream.prompt_ids.count(b",") + 1, stream.tokens
            usage = {"prompt_tokens": prompt, "total_tokens": prompt + answer, "completion_tokens": answer}
            self._client.write(chunk(stream, None, usage))
        if not stream.done:
            self._client.write(b"data: [DONE]\n\n")
        self._client.finish()
        return "completed"

    async def _replay(self, stream: GeneratedStream, lost: Collection[Worker]) -> None:
        delivery = Replayed(self._client, stream, self._asked)
        await self._attempt(self._call.exchange.target, self._fields, self._demand, delivery, lost)
        self._client.finish()

    async def _resume(self, stream: GeneratedStream, lost: Collection[Worker]) -> None:
        left = [worker for worker in self._call.serving.answering if worker not in lost]
        if not left:
            raise CannotGoOn("no other replica is in rotation")
        engines, worker = self._migrator.engines, left[0]
        if self._prompt is None:
            self._prompt = stream.prompt_ids or await engines.prompt_ids(worker, self._json)
        prompt_tokens = self._prompt.count(b",") + 1
        model = self._json.get("model")
        place = await cut(
            stream, self._json, lambda ids: engines.text(worker, model, ids),
            exact=self._engine.text_ends_with_token,
        )  # fmt: skip
        most = self._engine.answer_budget(self._json)
        if most is None:
            most = await engines.context(worker) - prompt_tokens
        if most <= place.tokens:
            self._end_here(stream, place.rest)
            return
        delivery = Resumed(
            self._client, stream, place, prompt_tokens=prompt_tokens, body=self._json,
            stop_member=self._engine.stop_member,
        )  # fmt: skip
        prompt = msgspec.Raw(b"[" + (self._prompt + b"," + place.ids).rstrip(b",") + b"]")
        request = self._engine.resume_request(
            self._json, prompt, generated=place.tokens, max_tokens=most - place.tokens
        )
        demand = msgspec.structs.replace(
            self._demand,
            prompt_tokens=prompt_tokens + place.tokens,
            output_tokens=max(1, self._demand.output_tokens - place.tokens),
        )
        await self._attempt(self._engine.resume_path, request, demand, delivery, lost)
        self._client.finish()

    def _end_here(self, stream: GeneratedStream, rest: str) -> None:
        """All tokens the answer may have are there; the event that says so was lost."""
        choice = text_choice(stream, rest, [], finish="length", stop_member=self._engine.stop_member)
        self._client.write(chunk(stream, choice))
        stream.finished = True
        self._complete(stream)
