"""Lets requests in: within the limits of their key and the budgets of the engines, in fair order."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from ...http.errors import HttpError
from ...http.exchange import Exchange
from ..board import Board
from ..demand import Demand
from ..keys.identity import BATCH, INTERACTIVE, NO_LIMITS, Identity
from ..keys.keyring import KeyRing
from ..keys.meter import Meter
from ..keys.quota import KeyState, Quota
from .bodies import Bodies, Held
from .budgets import Budgets, Pace
from .fair_queue import Entry, FairQueue

if TYPE_CHECKING:
    from ..config import RouterConfig
    from ..workers import WorkerTable

ENGINE_PART = 0.25
"""Of the seconds a request may wait: seconds of prompt work that engines may hold. Engines serve in order of
arrival; what waits here instead is served in fair order."""
BATCH_PATIENCE = 10.0
"""Batch requests may wait so much longer than interactive ones."""
OVERTIME = 1.5
"""A request whose wait was misjudged is refused when it has waited so much longer than it may."""
BODIES = 512 << 20
"""Bytes of bodies that all relays of an endpoint hold together; four of the largest if these are more."""
_LOOK_EVERY = 0.25
_POLL_EVERY = 0.02
"""Other relays' requests end without a word to us: who waits here looks so often whether there is room."""
_WATCH_EVERY = 1.0
_REASONS = {"prefill": "prefill_queue_full", "kv": "kv_cache_full"}


class Ticket(Entry):
    """A request on its way in, and what it holds once it is in. What it holds is given back at its end."""

    __slots__ = (
        "_admission", "_first", "_future", "_identity", "_key", "_model", "_prompt", "_streams", "_used",
        "deadline", "prefill", "waited",
    )  # fmt: skip

    def __init__(
        self, admission: Admission, identity: Identity, demand: Demand, model: str, streams: bool
    ) -> None:
        self.flow = identity.key
        self.weight = identity.weight
        # A client may ask for less than its key has, not for more.
        urgent = demand.priority >= INTERACTIVE and identity.priority >= INTERACTIVE
        self.priority = INTERACTIVE if urgent else BATCH
        self._prompt = demand.prompt_tokens
        self.prefill = float(demand.prompt_tokens)
        """Tokens of the prompt that have to be computed."""
        self.cost = float(demand.prompt_tokens + demand.output_tokens)
        self.queued = False
        self.arrived = self.deadline = 0.0
        self.waited = 0.0
        """Seconds in the queue."""
        self._admission = admission
        self._identity = identity
        self._model = model or demand.model
        self._streams = streams
        self._first = False
        self._used: tuple[int, int, int] | None = None
        self._key: KeyState | None = None
        self._future: asyncio.Future[None] | None = None

    # What the holder says

    def placed(self, uncached_tokens: int) -> None:
        """A worker was chosen that has to compute so many tokens of the prompt; again after a retry."""
        if not self._first:
            self._admission.prefill.add(uncached_tokens - self.prefill)
            self.prefill = float(uncached_tokens)

    def first_byte(self) -> None:
        """The prompt is computed; may be called more than once."""
        if not self._first:
            self._first = True
            self._admission.computed(self.prefill)

    def used(self, *, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> None:
        """What the engine counted. Call it again for each further answer of one request: it adds up."""
        before = self._used or (0, 0, 0)
        self._used = (
            before[0] + prompt_tokens, before[1] + cached_tokens, before[2] + completion_tokens,
        )  # fmt: skip

    # Its life

    async def __aenter__(self) -> Ticket:
        admission = self._admission
        loop = admission.loop()
        self.arrived = now = loop.time()
        admission.look(now)
        if self._identity.limits is not NO_LIMITS:
            self._key = admission.quota.take(self._identity, self.cost, now)
        if not admission.queue.waiting_anywhere and admission.fits(self) is None:
            self._take_at_once(loop)
            return self
        self._future = loop.create_future()
        try:
            admission.enqueue(self, now)
            await self._future
        except BaseException:
            self._leave_queue()
            raise
        self.waited = loop.time() - now
        return self

    def enter(self) -> bool:
        """Instead of `async with`: let in at once where it need not wait, and `leave()` ends it.

        False: it must wait, and nothing was taken. Raises HttpError 403 and 429 for its key's limits.
        """
        admission = self._admission
        loop = admission.loop()
        self.arrived = now = loop.time()
        admission.look(now)
        if admission.queue.waiting_anywhere or admission.fits(self) is not None:
            return False
        if self._identity.limits is not NO_LIMITS:
            self._key = admission.quota.take(self._identity, self.cost, now)
        self._take_at_once(loop)
        return True

    def _take_at_once(self, loop: asyncio.AbstractEventLoop) -> None:
        self._admission.queue.charge(self.flow, self.weight, self.cost)
        self._take(loop)

    def let_in(self) -> None:
        """The queue's answer. The budgets are taken now, not when the waiting task runs."""
        self._take(asyncio.get_running_loop())
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    def refuse(self, error: HttpError) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_exception(error)

    @property
    def gone(self) -> bool:
        """Nobody waits for it any more."""
        return self._future is None or self._future.done()

    def _leave_queue(self) -> None:
        admission = self._admission
        let_in = self._future is not None and self._future.done() and not self._future.cancelled()
        if let_in and self._future is not None and self._future.exception() is None:
            # Let in and cancelled in the same moment.
            self._end(None)
            return
        admission.queue.remove(self)
        if self._key is not None:
            self._key.give_back(self.cost, 0.0)

    def _take(self, loop: asyncio.AbstractEventLoop) -> None:
        admission = self._admission
        admission.budgets.seen(self._prompt, self.cost)
        if not self._streams:
            # Its first byte comes with its last: the time its prompt takes is judged by the pace of all.
            rate = admission.budgets.rate
            if rate > 0.0:
                loop.call_later((admission.prefill.total + self.prefill) / rate, self.first_byte)
        admission.prefill.add(self.prefill)
        admission.kv.add(self.cost)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave(error)

    def leave(self, error: BaseException | None) -> None:
        """Give back what it holds; `error` is what ended the request, if anything did."""
        self._end(self._used or self._guess(error))

    def _guess(self, error: BaseException | None) -> tuple[int, int, int] | None:
        """What was used where the engine did not say; None: nothing came of this request."""
        if self._first and self._streams:
            return self._prompt, 0, int(self.cost) - self._prompt
        if error is None:
            return 0, 0, 0  # a route without tokens
        if not self._first:
            return None
        return (self._prompt, 0, 0) if isinstance(error, asyncio.CancelledError) else None

    def _end(self, used: tuple[int, int, int] | None) -> None:
        admission = self._admission
        if not self._first:
            self._first = True
            admission.prefill.add(-self.prefill)
        admission.kv.add(-self.cost)
        tokens = float(used[0] + used[2]) if used is not None else 0.0
        admission.queue.charge(self.flow, self.weight, tokens - self.cost)
        if self._key is not None:
            self._key.give_back(self.cost, tokens)
        if used is not None:
            admission.meter.count(
                self._identity, self._model,
                prompt_tokens=used[0], cached_tokens=used[1], completion_tokens=used[2],
            )  # fmt: skip
        if admission.queue.waiting:
            admission.dispatch()


class Admission:
    """One per relay."""

    def __init__(
        self,
        config: RouterConfig,
        board: Board,
        *,
        table: WorkerTable,
        meter: Meter | None = None,
        keyring: KeyRing | None = None,
    ) -> None:
        self._table = table
        self._keyring = keyring
        self._patience = {
            INTERACTIVE: config.queue_seconds,
            BATCH: config.queue_seconds * BATCH_PATIENCE,
        }
        self.meter = meter or Meter()
        self.quota = Quota(board, self.meter)
        self.queue = FairQueue(board)
        self.budgets = Budgets(config.queue_seconds * ENGINE_PART)
        self.prefill = board.cell("prefill")
        """Tokens of prompts that were let in and had no first byte yet."""
        self.kv = board.cell("kv")
        """Tokens of prompts and expected answers that were let in and run."""
        self._computed = board.cell("computed")
        self.bodies = Bodies(max(BODIES, 4 * config.max_body) // config.processes)
        self._drains = {INTERACTIVE: Pace(), BATCH: Pace()}
        """Tokens of prompts and answers a second that leave this queue, by class."""
        self._drained = {INTERACTIVE: 0.0, BATCH: 0.0}
        self._processes = config.processes
        self._waiting: dict[int, deque[Ticket]] = {INTERACTIVE: deque(), BATCH: deque()}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._next_look = 0.0
        self._poll: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None

    # What the app asks

    def body(self, exchange: Exchange, largest: int) -> Held:
        """Held around reading and keeping a body: see Bodies.hold."""
        return self.bodies.hold(exchange, largest)

    def admit(self, identity: Identity, demand: Demand, *, model: str = "", streams: bool = True) -> Ticket:
        """`async with admission.admit(identity, demand, streams=…) as ticket:`

        Raises HttpError 403 and 429 with x-hpcserve-reason, the latter with retry-after. `model` is
        what usage is counted under; that of `demand` unless given.
        """
        return Ticket(self, identity, demand, model, streams)

    def start(self) -> None:
        """Begin to watch keys' limits; the first request does so, too."""
        self.loop()

    def close(self) -> None:
        for timer in (self._poll, self._watch):
            if timer is not None:
                timer.cancel()

    def gauges(self) -> Mapping[str, tuple[str, dict[tuple[tuple[str, str], ...], float]]]:
        """Gauges that add up over processes: name -> (help text, values)."""
        waiting = {INTERACTIVE: 0, BATCH: 0}
        for entry in self.queue:
            waiting[entry.priority] += 1
        return {
            "hpcserve_router_queue_requests": (
                "Requests waiting for room at the engines, by class.",
                {
                    (("class", "interactive"),): waiting[INTERACTIVE],
                    (("class", "batch"),): waiting[BATCH],
                },
            ),
            "hpcserve_router_queue_tokens": ("Tokens of these.", {(): self.queue.backlog}),
            "hpcserve_router_body_bytes": ("Bytes of request bodies in memory.", {(): self.bodies.held}),
        }

    # What tickets ask

    def loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._look_at_keys()
        return self._loop

    def look(self, now: float) -> None:
        """Now and then: what is known about the workers."""
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_EVERY
        table = self._table
        computing = (table.with_role("prefill") if table.disaggregated else None) or table.answering
        mean = self.budgets.prompt_tokens
        pressed = self.queue.waiting > 0
        self.budgets.pace.look(self._computed.total, now, pressed=pressed, mean=mean)
        for priority, drain in self._drains.items():
            waits = self.queue.waits(priority)
            drain.look(self._drained[priority], now, pressed=waits, mean=self.budgets.tokens)
        self.budgets.look(computing, table.answering)
        self.queue.settle()

    def fits(self, ticket: Ticket) -> str | None:
        """None when the engines have room; else which budget is used up.

        What is larger than a whole budget goes when nothing else runs. No workers have no budget:
        that nobody can answer is told elsewhere.
        """
        return self.lacking(ticket.prefill, ticket.cost)

    def lacking(self, tokens: float, cost: float) -> str | None:
        """`fits()` of a request with so many tokens of prompt, and of prompt and answer."""
        budgets = self.budgets
        if not budgets.workers:
            return None
        prefill = self.prefill.total
        if prefill > 0.0 and prefill + tokens > budgets.prefill:
            return "prefill"
        if budgets.kv is not None:
            kv = self.kv.total
            if kv > 0.0 and kv + cost > budgets.kv:
                return "kv"
        return None

    def computed(self, tokens: float) -> None:
        self.prefill.add(-tokens)
        self._computed.add(tokens)
        if self.queue.waiting:
            self.dispatch()

    def enqueue(self, ticket: Ticket, now: float) -> None:
        """Raises HttpError 429 when it would wait too long."""
        patience = self._patience[ticket.priority]
        seconds = self._expected(ticket)
        if seconds > patience:
            raise self._busy(ticket, seconds)
        ticket.deadline = now + patience * OVERTIME
        self.queue.push(ticket)
        self._waiting[ticket.priority].append(ticket)
        self.dispatch()
        if self._poll is None:
            self._poll = self.loop().call_later(_POLL_EVERY, self._on_poll)

    def _expected(self, ticket: Ticket) -> float:
        """Seconds until it would be let in."""
        ahead = self.queue.ahead(ticket)
        measured = self._drains[ticket.priority].measured
        if measured is not None:
            return ahead / max(measured, 1.0)
        # Nobody waited so far: prompts are computed at the engines' pace, and answers come with them.
        budgets = self.budgets
        rate = budgets.rate * budgets.tokens / budgets.prompt_tokens / self._processes
        return (ahead + self.queue.above(ticket.priority)) / max(rate, 1.0)

    def _busy(self, ticket: Ticket, seconds: float) -> HttpError:
        budget = self.fits(ticket) or "prefill"
        patience = self._patience[ticket.priority]
        retry = max(1, min(math.ceil(seconds - patience), 600))
        what = "with prompts" if budget == "prefill" else "with answers"
        return HttpError(
            429,
            f"the engines are busy {what}: this would wait {seconds:.0f} s, and {patience:g} s are the limit",
            headers=((b"retry-after", b"%d" % retry), (b"x-hpcserve-reason", _REASONS[budget].encode())),
            code=_REASONS[budget],
        )

    def dispatch(self) -> None:
        """Let in who is next, as long as there is room and nobody in another process goes first."""
        queue, budgets, now = self.queue, self.budgets, self.loop().time()
        # Processes look for room in turns; each may then let in what is computed until it looks again.
        slack = budgets.rate * budgets.tokens / budgets.prompt_tokens * _POLL_EVERY * 2
        while isinstance(ticket := queue.head(), Ticket):
            if ticket.gone:
                queue.remove(ticket)
                continue
            if self.fits(ticket) is not None or queue.yields(now, slack):
                break
            queue.pop()
            self._drained[ticket.priority] += ticket.cost
            ticket.let_in()
        queue.show(now)

    # Timers

    def _on_poll(self) -> None:
        loop = self.loop()
        now = loop.time()
        self.look(now)
        self.dispatch()
        for waiting in self._waiting.values():
            while waiting and (not waiting[0].queued or waiting[0].deadline <= now):
                ticket = waiting.popleft()
                if ticket.queued:
                    self.queue.remove(ticket)
                    ticket.refuse(self._busy(ticket, now - ticket.arrived))
        any_left = any(self._waiting.values())
        self._poll = loop.call_later(_POLL_EVERY, self._on_poll) if any_left else None

    def _look_at_keys(self) -> None:
        loop = self.loop()
        identities = self._keyring.identities() if self._keyring is not None else ()
        self.quota.look(identities, loop.time())
        self._watch = loop.call_later(_WATCH_EVERY, self._look_at_keys)
