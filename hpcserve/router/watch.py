"""What the supervisor asks engines: are they alive (workers nobody else watches), and how are they doing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from .. import engines
from ..http.bearer import bearer
from ..http.client import Pool
from ..http.errors import UpstreamError
from .config import RouterConfig, WorkerSpec
from .placement import iteration_stats
from .placement.facts import EngineFacts

log = logging.getLogger(__name__)

_EVERY = 2.0
_PATIENCE = 2.0
_STRIKES = 2
"""Checks in a row without an answer that take a worker out; a refused connection does so at once."""
_WORKER_COST = 0.02
"""Seconds between two readings per worker: parsing one takes some milliseconds."""
_METRICS_MAX = 16 * 1024 * 1024
_MODELS_EVERY = 30.0
_NO_ROUTE = frozenset({404, 405, 501})

Specs = tuple[WorkerSpec, ...]
Models = tuple[Mapping[str, Any], ...]
"""The entries of a worker's /v1/models."""


_Start = tuple[str, str, int]


def _start(spec: WorkerSpec) -> _Start:
    """One start of an engine: the next one counts from zero."""
    return spec.name, spec.url, spec.generation


class _ModelList(msgspec.Struct):
    data: list[dict[str, Any]]


class Watch:
    """Asks engines over HTTP, all at once, every two seconds."""

    def __init__(self, config: RouterConfig) -> None:
        engine = engines.get(config.engine)
        self._health, self._metrics = engine.health_path, engine.metrics_path
        self._waits = engine.metrics_wait
        self._headers = bearer(config.job_key)
        self._pool = Pool(connect_timeout=_PATIENCE)
        self._strikes: dict[str, int] = {}
        self._last: dict[_Start, EngineFacts] = {}
        """What was read of engines whose metrics tell only what is new."""
        self._kick = asyncio.Event()
        self._kick_models = asyncio.Event()

    def kick(self) -> None:
        """Check now: somebody had trouble with a worker."""
        self._kick.set()

    def kick_models(self) -> None:
        """Ask now which models workers serve: there are new ones."""
        self._kick_models.set()

    async def alive(self, specs: Iterable[WorkerSpec], tell: Callable[[Specs], None]) -> None:
        """Until cancelled: `tell` which of `specs` answer, at first and at each change."""
        specs = tuple(specs)
        last: Specs | None = None
        while True:
            self._kick.clear()
            answers = await asyncio.gather(*(self._answers(spec) for spec in specs))
            found = tuple(spec for spec, answer in zip(specs, answers, strict=True) if answer)
            if found != last:
                self._log(specs, found, last)
                # Which of several models a worker serves must be known before it gets requests.
                tell(tuple(await asyncio.gather(*(self._with_models(spec) for spec in found))))
                last = found
            try:
                await asyncio.wait_for(self._kick.wait(), _EVERY)
                await asyncio.sleep(0.05)
            except TimeoutError:
                pass

    def _log(
        self,
        specs: tuple[WorkerSpec, ...],
        found: tuple[WorkerSpec, ...],
        last: tuple[WorkerSpec, ...] | None,
    ) -> None:
        for spec in specs:
            before = last is not None and spec in last
            if spec in found and not before:
                log.info("%s at %s answers: in rotation", spec.name, spec.url)
            elif spec not in found and (before or last is None):
                log.warning("%s at %s does not answer: out of rotation until it does", spec.name, spec.url)

    async def _answers(self, spec: WorkerSpec) -> bool:
        try:
            async with asyncio.timeout(_PATIENCE):
                url = spec.url.rstrip("/") + self._health
                async with await self._pool.request("GET", url, headers=self._headers) as response:
                    await response.read(_METRICS_MAX)
            # An engine without such a route answers all the same.
            good = response.status < 400 or response.status in _NO_ROUTE
            strikes = 0 if good else _STRIKES
        except (UpstreamError, TimeoutError) as error:
            refused = isinstance(error, UpstreamError) and error.fault == "connect"
            strikes = _STRIKES if refused else self._strikes.get(spec.name, _STRIKES) + 1
        self._strikes[spec.name] = strikes
        return strikes < _STRIKES

    async def facts(
        self,
        specs: Callable[[], Iterable[WorkerSpec]],
        busy: Callable[[str], bool],
        tell: Callable[[Mapping[str, Mapping[str, Any]]], None],
    ) -> None:
        """Until cancelled: `tell` what the engines in rotation say of themselves. `busy`: has the worker of
        this name requests?"""
        while True:
            current = tuple(specs())
            await asyncio.sleep(max(_EVERY, _WORKER_COST * len(current)))
            asked = {spec.name for spec in current if not self._waits or busy(spec.name)}
            urls = {spec.url.rstrip("/") for spec in current if spec.name in asked}
            texts = dict(await asyncio.gather(*map(self._metrics_of, urls)))
            read = [
                self._facts(spec, texts[spec.url.rstrip("/")]) if spec.name in asked else self._idle(spec)
                for spec in current
            ]
            running = set(map(_start, current))
            self._last = {start: facts for start, facts in self._last.items() if start in running}
            told = {spec.name: facts for spec, facts in zip(current, read, strict=True) if facts is not None}
            if told:
                tell(told)

    async def _metrics_of(self, url: str) -> tuple[str, bytes | None]:
        """A server's metrics, of all its ranks. None: it does not say; its liveness is not this method's
        business."""
        try:
            async with asyncio.timeout(_PATIENCE + self._waits):
                path = url + self._metrics
                async with await self._pool.request("GET", path, headers=self._headers) as response:
                    text = await response.read(_METRICS_MAX)
            return url, text if response.status == 200 else None
        except (UpstreamError, TimeoutError) as error:
            log.debug("no metrics at %s: %s", url, error)
            return url, None

    def _facts(self, spec: WorkerSpec, text: bytes | None) -> Mapping[str, Any] | None:
        if text is None:
            return None
        try:
            if not iteration_stats.is_list(text):
                return dataclasses.asdict(EngineFacts.parse(text.decode("utf-8", "replace"), spec.rank))
            start = _start(spec)
            self._last[start] = facts = iteration_stats.read(text, self._last.get(start))
            return dataclasses.asdict(facts)
        except ValueError as error:
            log.debug("no metrics of %s: %s", spec.name, error)
            return None

    def _idle(self, spec: WorkerSpec) -> Mapping[str, Any] | None:
        """What is known already, of an engine that would have to be waited for."""
        last = self._last.get(_start(spec))
        return None if last is None else dataclasses.asdict(iteration_stats.idle(last))

    async def models(
        self, specs: Callable[[], Iterable[WorkerSpec]], tell: Callable[[Mapping[str, Models]], None]
    ) -> None:
        """Until cancelled: `tell` which models workers serve, where that has changed."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._kick_models.wait(), _MODELS_EVERY)
            self._kick_models.clear()
            current = tuple(specs())
            read = await asyncio.gather(*(self._models(spec) for spec in current))
            changed = {
                spec.name: models
                for spec, models in zip(current, read, strict=True)
                if models is not None and models != spec.models
            }
            if changed:
                tell(changed)

    async def _with_models(self, spec: WorkerSpec) -> WorkerSpec:
        return msgspec.structs.replace(spec, models=spec.models or await self._models(spec) or ())

    async def _models(self, spec: WorkerSpec) -> Models | None:
        try:
            async with asyncio.timeout(_PATIENCE):
                url = spec.url.rstrip("/") + "/v1/models"
                async with await self._pool.request("GET", url, headers=self._headers) as response:
                    text = await response.read(_METRICS_MAX)
            if response.status != 200:
                return None
            return tuple(msgspec.json.decode(text, type=_ModelList).data)
        except (UpstreamError, TimeoutError, msgspec.DecodeError) as error:
            log.debug("no list of models of %s: %s", spec.name, error)
            return None

    async def close(self) -> None:
        await self._pool.close()
