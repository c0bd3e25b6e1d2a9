"""Follows one publisher of KV events: what was missed is replayed, and a start from 0 is noticed.

Frames: `[topic, sequence number (8 bytes, big endian), batch]`. The replay socket answers an 8-byte start
number with `["", topic, sequence number, batch]` for each batch that is kept, and number -1 at the end.
Engines keep 10,000 batches by default.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

import zmq
import zmq.asyncio
from xxhash import xxh3_64_intdigest

from . import format
from .digest import Digest

log = logging.getLogger(__name__)

ASK_EVERY = 5.0
"""Seconds between two looks for batches that were lost without a later one to show it."""
PATIENCE = 10.0
"""Seconds for an answer to such a look, after which the source counts as silent."""
_END = (-1).to_bytes(8, "big", signed=True)
_HIGH_WATER_MARK = 100_000
_MOST_HELD = 20_000
"""Batches held back while an answer is on its way."""
_TICK = 0.25
_LARGEST = 256 << 20


class Publisher:
    """One data-parallel rank's events, applied to `digest` under `rank`.

    `warn(message, hint)` is called once for each trouble, `changed()` after each change.
    """

    def __init__(
        self,
        events: str,
        replay: str | None,
        *,
        context: zmq.asyncio.Context,
        digest: Digest,
        rank: int,
        warn: Callable[[str, str], None],
        changed: Callable[[], None],
        ask_every: float = ASK_EVERY,
        patience: float = PATIENCE,
    ) -> None:
        """Raises ValueError for an address ZMQ doesn't understand."""
        self._endpoint = events
        self._digest = digest
        self._rank = rank
        self._warn = warn
        self._changed = changed
        self._ask_every = ask_every
        self._patience = patience
        self.live = False
        """Is all that the publisher says followed?"""
        self._expected = 0
        self._last = 0
        """Digest of the last batch that was applied."""
        self._asked: float | None = None
        """When the running replay was asked for."""
        self._ask_at = 0.0
        self._skip = False
        """The running replay is of no use."""
        self._answered = 0
        """Batches of the running replay."""
        self._held: list[tuple[int, bytes]] = []
        """Batches that came while a replay was running."""
        self._replayed: OrderedDict[int, int] = OrderedDict()
        """Number -> digest of batches that were replayed: the same ones may still come by themselves."""
        self._said: set[str] = set()
        self._doubt = False
        """The connection was lost: what comes next may be from another start, whatever its number."""
        self._context = context
        self._replay_endpoint = replay
        self._subscriber = _connect(context, zmq.SUB, events)
        self._subscriber.subscribe(b"")
        self._lost = self._subscriber.get_monitor_socket(zmq.Event.DISCONNECTED)
        self._replay = None if replay is None else _connect(context, zmq.DEALER, replay)
        self._poller = zmq.asyncio.Poller()
        for socket in (self._lost, self._subscriber, self._replay):
            if socket is not None:
                self._poller.register(socket, zmq.POLLIN)

    async def run(self) -> None:
        """Until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            now = clock()
            if self._asked is not None and now - self._asked > self._patience:
                self._unanswered()
            if self._asked is None and (self._held or now >= self._ask_at):
                await self._ask(now)
            ready = dict(await self._poller.poll(_TICK * 1000))
            if self._lost in ready:
                # ZMQ says so before it hands on what came over the next connection.
                await self._lost.recv_multipart()
                self._lost_touch()
            if self._replay is not None and self._replay in ready:
                self._take_replayed(await self._replay.recv_multipart())
            if self._subscriber in ready:
                self._take_published(await self._subscriber.recv_multipart())

    def close(self) -> None:
        self._subscriber.disable_monitor()
        self._subscriber.close(linger=0)
        if self._replay is not None:
            self._replay.close(linger=0)

    def _lost_touch(self) -> None:
        if not self._expected:
            return
        if self._replay is None:
            self._start_anew()
        else:
            self._doubt = True
            self._ask_at = 0.0

    async def _ask(self, now: float) -> None:
        """Ask for the last batch that was seen and all after it: if it is another now, all begins anew."""
        self._ask_at = now + self._ask_every
        if self._replay is None:
            return
        self._asked, self._answered = now, 0
        with suppress(zmq.Again):  # nobody has read earlier questions, which shows as silence
            first = max(self._expected - 1, 0)
            await self._replay.send_multipart((b"", first.to_bytes(8, "big")), zmq.NOBLOCK)

    def _take_published(self, frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[1]) != 8:
            self._trouble("sends what is not [topic, number, batch]", "is it a publisher of KV events?")
            return
        number, batch = int.from_bytes(frames[1], "big"), frames[2]
        if self._asked is None and not self._doubt:
            self._take(number, batch)
        elif len(self._held) < _MOST_HELD:
            # What does not fit is missed later, and asked for.
            self._held.append((number, batch))

    def _take_replayed(self, frames: list[bytes]) -> None:
        if len(frames) != 4 or self._asked is None:
            return
        if frames[2] == _END:
            self._caught_up()
            return
        number, batch = int.from_bytes(frames[2], "big"), frames[3]
        self._answered += 1
        if number == self._expected - 1:
            if xxh3_64_intdigest(batch) == self._last:
                self._doubt = False
            else:
                # Of the new start, only the end comes now: the next answer has all of it.
                self._start_anew()
                self._skip = True
        elif self._doubt:
            # The batch that could tell is no longer kept.
            self._start_anew()
        if self._skip or number < self._expected:
            return
        self._replayed[number] = xxh3_64_intdigest(batch)
        if len(self._replayed) > _MOST_HELD:
            self._replayed.popitem(last=False)
        self._apply(number, batch)

    def _take(self, number: int, batch: bytes) -> None:
        """In order: apply. Ahead: hold it until that was asked for. Behind: known, or a new start."""
        if number < self._expected:
            if self._replayed.pop(number, None) == xxh3_64_intdigest(batch):
                return
            self._start_anew()
        if number > self._expected and self._replay is not None:
            self._held.append((number, batch))
        else:
            self._apply(number, batch)

    def _caught_up(self) -> None:
        """The answer is complete."""
        if not self._answered and self._expected:
            # Not even the last one that was seen.
            self._start_anew()
        self._go_on(replayable=bool(self._answered))
        self._set_live(True)

    def _go_on(self, *, replayable: bool) -> None:
        """Take what came while an answer was awaited."""
        self._asked, self._skip = None, False
        held, self._held = self._held, []
        for number, batch in held:
            if number > self._expected and not replayable:
                self._apply(number, batch)
            else:
                self._take(number, batch)

    def _unanswered(self) -> None:
        held = bool(self._held)
        if self._doubt:
            self._start_anew()
        self._go_on(replayable=False)
        if self._replay is not None and self._replay_endpoint is not None:
            # An answer to this question must not be taken for one to the next.
            self._poller.unregister(self._replay)
            self._replay.close(linger=0)
            self._replay = _connect(self._context, zmq.DEALER, self._replay_endpoint)
            self._poller.register(self._replay, zmq.POLLIN)
        hint = "is the replay address right, and the engine up?"
        if held:
            self._trouble("does not replay events; after a gap its cache is known from there on only", hint)
        else:
            self._set_live(False)
            self._trouble(f"gave no sign for {self._patience:g} s: what it caches is predicted", hint)

    def _start_anew(self) -> None:
        log.info("%s has started again: its cache was empty", self._endpoint)
        self._digest.clear(self._rank)
        self._replayed.clear()
        self._expected = 0
        self._doubt = False
        self._ask_at = 0.0
        self._changed()

    def _apply(self, number: int, batch: bytes) -> None:
        if number > self._expected:
            log.info("%s: batches %d to %d are lost", self._endpoint, self._expected, number - 1)
            self._digest.clear(self._rank)
        self._expected = number + 1
        self._last = xxh3_64_intdigest(batch)
        try:
            self._digest.apply(format.decode(batch), self._rank)
        except ValueError as error:
            self._digest.clear(self._rank)
            self._trouble(f"sends KV events that can't be read: {error}", "is its version supported?")
        if self._replay is None:
            self._set_live(True)
        self._changed()

    def _set_live(self, live: bool) -> None:
        if live != self.live:
            self.live = live
            self._changed()
        if live:
            self._said.clear()

    def _trouble(self, what: str, hint: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._warn(f"{self._endpoint} {what}", hint)


def _connect(context: zmq.asyncio.Context, kind: int, address: str) -> zmq.asyncio.Socket:
    socket = context.socket(kind)
    socket.set_hwm(_HIGH_WATER_MARK)
    socket.setsockopt(zmq.MAXMSGSIZE, _LARGEST)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    try:
        socket.connect(address)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise ValueError(f"{address}: {error.strerror}") from error
    return socket
