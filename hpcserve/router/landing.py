"""What becomes of a flight that can't go on by itself: a task answers the rest of its request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from ..http.exchange import Exchange
from ..http.response import UpstreamResponse
from .call import Call
from .demand import Demand
from .legs import LegFailure
from .relay import ClientDelivery
from .stream.asked import Asked
from .stream.generated import GeneratedStream
from .workers import Worker

if TYPE_CHECKING:
    from .admission.admission import Ticket
    from .app import Router

_Work = Callable[[], Awaitable[dict[str, Any] | None]]


class Landed(Protocol):
    """The flight."""

    def landed(self) -> None:
        """The task runs. Until then it is the flight that hears of the client's leaving."""
        ...

    def keep(self, ids: bytes) -> bool:
        """May the ids of the prompt be kept?"""
        ...

    def close(self, error: BaseException | None) -> None:
        """All is over."""
        ...


class Landing:
    """One of its methods is called, and once."""

    def __init__(
        self, router: Router, call: Call, demand: Demand, asked: Asked, ticket: Ticket, flight: Landed
    ) -> None:
        self._router = router
        self._call = call
        self._demand = demand
        self._asked = asked
        self._ticket = ticket
        self._flight = flight
        self._delivery = ClientDelivery(call, router.metrics)

    def after(self, failure: LegFailure, stream: GeneratedStream | None, first_at: float) -> None:
        """A worker failed: before the answer began, or in the middle of `stream`, begun at `first_at`."""
        self._delivery.expect(self._asked, self._flight.keep)
        if stream is not None:
            self._delivery.adopt(stream, first_at)
        fields = {**(self._call.fields or {}), **self._asked.added}
        go_on = self._router.runner.go_on
        self._run(partial(go_on, self._call, self._demand, self._delivery, self._asked, fields, failure))

    def anew(self) -> None:
        """Nothing was sent to the client: begin again."""
        self._run(partial(self._router.runner.run, self._call, self._demand, self._delivery))

    def answered(self, worker: Worker, failed: frozenset[int], response: UpstreamResponse) -> None:
        """`worker` answered no stream of text; statuses in `failed` are its failures."""
        self._delivery.expect(self._asked, self._flight.keep)
        take_over = self._router.runner.take_over
        self._run(partial(take_over, self._call, self._demand, self._delivery, worker, failed, response))

    def _run(self, work: _Work) -> None:
        self._call.exchange.hand_over(partial(self._answer, work))

    async def _answer(self, work: _Work, exchange: Exchange) -> None:
        self._flight.landed()
        call = self._call
        await self._router.conclude(exchange, call.route, call.request_id, self._finish(work))

    async def _finish(self, work: _Work) -> None:
        ended_by: BaseException | None = None
        try:
            usage = await work()
            gap = self._delivery.inter_token
            self._router.account.served(self._call, self._demand, gap, self._ticket, usage)
        except BaseException as error:
            ended_by = error
            raise
        finally:
            self._flight.close(ended_by)
