"""One leg: a request to one worker, from choosing it to the end of its answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Literal, Protocol

import msgspec

from ..http.client import Pool
from ..http.errors import Header, HttpError, UpstreamError
from ..http.response import UpstreamResponse
from .config import RouterConfig
from .demand import Demand
from .metrics import Metrics
from .placement.decision import Decision
from .placement.placer import Placer
from .stream.generated import GIVEN_UP, EngineFault, given_up
from .workers import Worker, WorkerGone

log = logging.getLogger(__name__)

Fault = Literal["connect", "reset", "protocol", "too-large", "timeout", "status", "gone", "stream"]

# The worker can't serve now, or does not know our key: another one may do better.
UNAVAILABLE = frozenset({401, 502, 503, 504})
FAILED = UNAVAILABLE | {500}
PREFILL_FAILED = FAILED | {403}

_STATUS: dict[Fault, int] = {"timeout": 504, "connect": 503, "gone": 503}


class LegFailure(Exception):
    """A worker did not answer, or its answer broke off."""

    def __init__(
        self,
        fault: Fault,
        worker: Worker,
        message: str,
        *,
        status: int | None = None,
        event: bytes | None = None,
    ) -> None:
        super().__init__(message)
        self.fault = fault
        self.worker = worker
        self.message = f"{worker.name}: {message}"
        self.status = status
        """The engine's, where it gave one."""
        self.event = event
        """The error event that the engine ended its stream with."""

    def http_error(self) -> HttpError:
        """What the client is told when no other worker could do it either."""
        status = self.status if self.fault == "stream" and self.status else _STATUS.get(self.fault, 502)
        return HttpError(status, self.message, headers=((b"retry-after", b"1"),), code=f"worker_{self.fault}")


def failures(worker: Worker, decision: Decision) -> frozenset[int]:
    """Statuses with which `worker` says that another one should be asked."""
    if worker is decision.prefill:
        return PREFILL_FAILED
    # A decode engine's 500 may be about the KV transfer: worth a second prompt elsewhere.
    return FAILED if decision.prefill is not None else UNAVAILABLE


def no_worker(what: str) -> HttpError:
    """The client's answer when there is nobody to ask."""
    return HttpError(
        503, f"no {what} replica is in rotation", headers=((b"retry-after", b"5"),), code="no_worker"
    )


class EngineAnswer(Exception):
    """An engine's refusal that the client gets as it is."""

    def __init__(self, status: int, headers: list[Header], body: bytes) -> None:
        super().__init__(f"the engine answered {status}")
        self.status = status
        self.headers = headers
        self.body = body


class Request(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What is sent to an engine."""

    method: str = "POST"
    target: str
    headers: list[Header]
    body: bytes
    streams: bool
    demand: Demand


class Delivery(Protocol):
    """Where an engine's answer goes."""

    @property
    def started(self) -> bool:
        """Something went to the client, so the leg can't be run again."""
        ...

    @property
    def pieces(self) -> int:
        """Pieces of the answer that have come: while this grows, the worker is alive."""
        ...

    async def deliver(self, response: UpstreamResponse, first: bytes) -> None:
        """Take the answer; `first` is the first piece of its body, already read."""
        ...


class Onward:
    """Looks at an answer before another delivery takes it."""

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery

    @property
    def started(self) -> bool:
        return self._delivery.started

    @property
    def pieces(self) -> int:
        return self._delivery.pieces

    async def deliver(self, response: UpstreamResponse, first: bytes) -> None:
        await self._delivery.deliver(response, first)


class Legs:
    """Sends legs to workers and remembers how they fared."""

    def __init__(
        self,
        config: RouterConfig,
        pool: Pool,
        metrics: Metrics,
        suspect: Callable[[Worker, str], None],
        placer: Placer,
    ) -> None:
        self.pool = pool
        self._metrics = metrics
        self._suspect = suspect
        self._placer = placer
        self.first_byte_timeout = config.first_byte_timeout
        self.attempts = config.retries + 1

    async def send(
        self,
        request: Request,
        worker: Worker,
        decision: Decision,
        delivery: Delivery,
        *,
        first_byte_timeout: float | None,
        failed: frozenset[int] = UNAVAILABLE,
        response: UpstreamResponse | None = None,
    ) -> None:
        """Run one leg on one worker. Raises LegFailure; an answer with a status in `failed` is one.

        With a `response`, the request was sent already and this is what came.

        `first_byte_timeout` is None where the first byte comes when all is written, however long that
        takes: a worker that dies meanwhile closes the connection, or is found silent, or is taken away by
        the head node. When the caller is cancelled, the connection to the worker is closed at once.
        """
        computes = worker is (decision.prefill or decision.answering)
        # An answer that comes whole says nothing of its prefill; a prefill leg is one token.
        tells = request.streams or worker is decision.prefill
        try:
            async with worker.lease(request.demand, decision) as lease:
                if computes:
                    self._placer.prefill_began(worker, decision.uncached_tokens, lease.since)
                try:
                    async with asyncio.timeout(first_byte_timeout):
                        if response is None:
                            response = await self.pool.request(
                                request.method,
                                worker.url + request.target,
                                headers=[*request.headers, *worker.headers],
                                body=request.body,
                            )
                        first = await response.next_chunk()
                    if response.status in failed:
                        said = refusal(response.status, first)
                        raise LegFailure("status", worker, said, status=response.status)
                    lease.first_byte()
                    if computes:
                        computes = False
                        now = asyncio.get_running_loop().time()
                        seconds = now - lease.since if tells else None
                        self._placer.prefill_ended(worker, decision.uncached_tokens, now, seconds=seconds)
                    lease.watch(delivery)
                    await delivery.deliver(response, first)
                finally:
                    if computes:
                        now = asyncio.get_running_loop().time()
                        self._placer.prefill_ended(worker, decision.uncached_tokens, now)
                    if response is not None:
                        response.abort()
        except TimeoutError:
            failure = LegFailure("timeout", worker, f"no byte within {first_byte_timeout:g} s")
        except UpstreamError as error:
            failure = LegFailure(error.fault, worker, error.message)
        except WorkerGone as error:
            failure = LegFailure("gone", worker, str(error))
        except EngineFault as error:
            failure = LegFailure("stream", worker, error.message, status=error.status, event=error.event)
        except LegFailure as error:
            failure = error
        else:
            return
        self.note(failure)
        raise failure

    def note(self, failure: LegFailure) -> None:
        """A leg failed: count it, and doubt its worker."""
        log.warning("leg failed (%s): %s", failure.fault, failure.message)
        self._metrics.errors.add(("reason", failure.fault))
        if failure.fault not in ("gone", "too-large"):
            failure.worker.breaker.failed(asyncio.get_running_loop().time())
            self._suspect(failure.worker, failure.message)

    def retried(self, leg: str) -> None:
        self._metrics.retries.add(("leg", leg))


def refusal(status: int, body: bytes) -> str:
    """What an engine's status says, with the engine's own words where it has some."""
    if status == 401:
        return "the engine answered 401: it does not take this run's job key"
    try:
        told = msgspec.json.decode(body)
        # vLLM's errors are members of `error`; SGLang's of the body (openai/serving_base.py).
        said = told.get("error", told)["message"]
    except (msgspec.DecodeError, UnicodeDecodeError, AttributeError, TypeError, KeyError):
        return f"the engine answered {status}"
    return f"the engine answered {status}: {str(said)[:300]}"


class Collected:
    """A delivery that keeps a whole answer in memory."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.status = 0
        self.headers: list[Header] = []
        self.body = b""
        self.arrived = 0.0
        """Event loop time at which the answer was whole."""
        self.pieces = 0

    @property
    def started(self) -> bool:
        return False

    async def deliver(self, response: UpstreamResponse, first: bytes) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = first + await response.read(self._limit)
        if GIVEN_UP in self.body:
            raise given_up()
        self.arrived = asyncio.get_running_loop().time()
