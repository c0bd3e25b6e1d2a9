"""What each worker's KV cache holds of a prompt: the index that placement asks.

Workers whose engines publish events are taken at their word, plus what was sent to them a moment ago.
For the others, and for parts of prompts whose tokens aren't known yet, what was sent to them counts, for
as long as their cache is large.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from ...engines.kv_events.messages import KvMessage, Op, pack, unpack
from .holders import ALL, IDS, Holders
from .match import Match, levels
from .messages import SharedMessage
from .numbers import Numbers
from .predicted import InFlight, Predicted
from .translation import Translation

if TYPE_CHECKING:
    from ..demand import Demand

log = logging.getLogger(__name__)

MOST_UNITS = 16_000_000
"""Confirmed token units of all workers."""
MOST_PREDICTED = 1_000_000
"""Predicted chunks of all workers."""
MOST_TRANSLATIONS = 2_000_000
"""Chunks whose token unit is known."""
IN_FLIGHT = 10.0
"""Seconds that a prompt counts as cached before an event must have said so."""
SILENT_TOKENS = 8192.0
SILENT_SECONDS = 10.0
"""A source that says nothing in this time, while its engine computes so many tokens, is not believed."""
_WAITING = -1
_MOST_BITS = 256
_MOST_SHARED = 4096
"""Prompts kept for `outgoing()` while nobody asks."""


_decode = msgspec.json.Decoder(KvMessage | SharedMessage).decode


class _Source:
    """One agent's news about one worker."""

    __slots__ = ("generation", "live", "next", "number", "silent", "told")

    def __init__(self, number: int, generation: int) -> None:
        self.number = number
        self.generation = generation
        self.next = 0
        self.live = False
        self.silent = False
        """It says nothing although its engine computes."""
        self.told = False
        """Did it store anything yet?"""


class _Made(dict[tuple[int, int, int], Match]):
    """Matches by what is in them: hundreds of workers hold the same."""

    def __missing__(self, key: tuple[int, int, int]) -> Match:
        match = self[key] = Match(*key)
        return match


def _alike(counts: Mapping[str, int]) -> dict[str, Match]:
    """All in GPU memory."""
    match_of = {count: Match(count) for count in set(counts.values())}
    return {name: match_of[count] for name, count in counts.items()}


class Residency:
    """One per router process; not shared between threads. Times are the event loop's."""

    def __init__(
        self,
        *,
        most_units: int = MOST_UNITS,
        most_predicted: int = MOST_PREDICTED,
        most_translations: int = MOST_TRANSLATIONS,
        share: bool = False,
    ) -> None:
        """`share`: collect for `outgoing()`."""
        self._holders = Holders(most=most_units)
        self._predicted = Predicted(most=most_predicted)
        self._in_flight = InFlight(ttl=IN_FLIGHT)
        self._translation = Translation(most=most_translations)
        # A worker has one number for what is predicted, and one for each source of events.
        self._numbers = Numbers(IDS, self._holders.forgotten)
        self._workers: dict[str, int] = {}
        self._sources: dict[tuple[str, int], _Source] = {}
        self._live_sources = self._live_workers = 0
        """A bit for each number."""
        self._bits_of: dict[tuple[str, ...], int] = {}
        """Sets of workers asked for lately: the same few come again and again."""
        self._quiet: dict[str, tuple[float, float]] = {}
        """Worker -> computed tokens and time when its events were last known to be up to date."""
        self.missing = True
        """Something an agent said was not heard: all must be told again. Set it back once that was asked.
        So it is at the start, which may be that of a relay in the middle of a run."""
        self._share = share
        self._shared: dict[int, int] = {}
        """Last chunk of a prompt that was sent -> its leading chunks that had been sent before."""
        self._placed: list[tuple[str, float, bytes]] = []
        self._learned = array("Q")

    # What placement asks.

    def matches(self, chain: Sequence[int], *, now: float) -> dict[str, Match]:
        """By worker's name, for each worker that holds at least the first chunk."""
        if not chain:
            return {}
        known = 0
        if self._live_sources:
            self._in_flight.turn(now)
            known = self._translation.known(chain)
        if not known:
            guessed = self._guessed(chain, 0, {})
            return _alike(guessed) if guessed else {}
        # Tiers from the fastest on: what is in GPU memory, there or in the host's, anywhere.
        reaches = [
            self._confirmed(chain, known, tiers) for tiers in ((1, 2, 3) if self._holders.tiered else (1,))
        ]
        held = reaches[-1]
        more = self._guessed(chain, known, held) if known < len(chain) else {}
        if reaches[0] == held:
            if not more:
                return _alike(held)
            return _alike({name: count + more.get(name, 0) for name, count in held.items()})
        gpu_of, host_of, made = reaches[0], reaches[1], _Made()
        if not gpu_of and not more and host_of == held:
            made_of = {count: Match(0, count) for count in set(held.values())}
            return {name: made_of[count] for name, count in held.items()}
        found = {}
        for name, count in held.items():
            gpu, host = gpu_of.get(name, 0), host_of.get(name, 0)
            found[name] = made[gpu + more.get(name, 0), host - gpu, count - host]
        return found

    def _confirmed(self, chain: Sequence[int], known: int, tiers: int) -> dict[str, int]:
        """How many of the first `known` chunks workers hold in the `tiers` fastest memories."""
        unit_of, holders, in_flight = self._translation.get, self._holders.get, self._in_flight.get
        predicted, sources, workers = self._predicted.get, self._live_sources, self._live_workers

        def holding(at: int) -> int:
            chunk = chain[at]
            unit = unit_of(chunk)
            bits = 0 if unit is None else holders(unit)
            mask = bits & ALL
            for tier in range(1, tiers):
                mask |= (bits >> tier * IDS) & ALL
            return mask & sources | in_flight(chunk) & workers | predicted(chunk, 0) & ~workers

        return self._counts(holding, known)

    def _guessed(self, chain: Sequence[int], start: int, held: Mapping[str, int]) -> dict[str, int]:
        """How many chunks after `start` were sent to the workers that hold all before."""
        marks = self._predicted.get
        allowed = -1
        if start:
            allowed = self._allowed(tuple([name for name, count in held.items() if count == start]))
        first = marks(chain[start], 0) & allowed
        if not first:
            return {}
        if marks(chain[-1], 0) & allowed == first:
            # A prompt that comes again.
            return dict.fromkeys(self._numbers.names(first), len(chain) - start)

        def holding(at: int) -> int:
            return marks(chain[start + at], 0) & allowed

        return self._counts(holding, len(chain) - start)

    def _allowed(self, names: tuple[str, ...]) -> int:
        """The bits of these workers."""
        bits = self._bits_of.get(names)
        if bits is None:
            if len(self._bits_of) >= _MOST_BITS:
                self._bits_of.clear()
            bits = 0
            for name in names:
                number = self._workers.get(name)
                if number is not None:
                    bits |= 1 << number
            self._bits_of[names] = bits
        return bits

    def _counts(self, holding: Callable[[int], int], length: int) -> dict[str, int]:
        counts: dict[str, int] = {}
        # Ascending, so that of a worker's several numbers the one that reaches furthest counts.
        for count, mask in sorted(levels(holding, length)):
            counts.update(dict.fromkeys(self._numbers.names(mask), count))
        return counts

    # What is fed.

    def predict(self, worker: str, demand: Demand, *, now: float) -> None:
        """`worker` is sent this prompt: it will hold it soon."""
        chain = demand.chain
        if not chain:
            return
        seen = self._predict(worker, chain, demand.chunk_tokens, now)
        if chain[-1] not in self._shared:
            if len(self._shared) >= _MOST_SHARED:
                self._shared.clear()
            self._shared[chain[-1]] = seen
        if self._share and len(self._placed) < _MOST_SHARED:
            self._placed.append((worker, demand.chunk_tokens, pack(chain)))

    def learn(self, demand: Demand, prompt_token_ids: bytes) -> None:
        """An engine said which tokens a prompt has: its ids as in a JSON array, without the brackets.

        Only what the prompt has in common with an earlier one is learned: most of a prompt that comes once
        is never asked for again. Raises ValueError for anything else. Takes 25 µs for a thousand tokens.
        """
        if not demand.chain:
            return
        shared = self._shared.pop(demand.chain[-1], len(demand.chain))
        pairs = self._translation.learn(demand, prompt_token_ids, shared)
        if self._share and len(self._learned) < _MOST_SHARED * 2:
            for pair in pairs:
                self._learned.extend(pair)

    def capacity(self, worker: str, tokens: float) -> None:
        """The size of a worker's KV cache: for how long predictions hold."""
        self._predicted.capacity(self._number(worker), tokens)

    def hear(self, batch: bytes, *, now: float) -> None:
        """A message as the control line carries it. Raises ValueError for one that can't be read."""
        self.apply(_decode(batch), now=now)

    def apply(self, message: KvMessage | SharedMessage, *, now: float) -> None:
        """News from an agent, or from another router process. Raises ValueError for broken hashes."""
        if isinstance(message, SharedMessage):
            self._take(message, now)
        else:
            source = self._source(message)
            if source is not None and self._in_order(source, message):
                for op in message.ops:
                    self._operate(source, message.worker, op)
                self._heard(source, message.worker)
        self._holders.sweep()

    def computed(self, worker: str, tokens: float, *, now: float) -> None:
        """An engine's own count of prompt tokens it has computed: new blocks, which it should announce."""
        known, since = self._quiet.setdefault(worker, (tokens, now))
        if tokens < known:
            self._quiet[worker] = (tokens, now)
        elif tokens - known >= SILENT_TOKENS and now - since >= SILENT_SECONDS and worker in self.live:
            log.warning(
                "%s announces no KV blocks although it computes: its cache is predicted until it does;"
                " is prefix caching on, and do its KV events get through?",
                worker,
            )
            for (name, _), source in self._sources.items():
                source.silent = source.silent or name == worker
            self._count_live()

    def outgoing(self) -> SharedMessage | None:
        """For the other processes, what is new since the last call; None if nothing is."""
        if not self._placed and not self._learned:
            return None
        message = SharedMessage(placed=tuple(self._placed), learned=self._learned.tobytes())
        self._placed, self._learned = [], array("Q")
        return message

    def forget(self, worker: str) -> None:
        """It was restarted, or is gone: its cache is empty."""
        for key, source in list(self._sources.items()):
            if key[0] == worker:
                del self._sources[key]
                self._retire(source.number)
        self._quiet.pop(worker, None)
        number = self._workers.pop(worker, None)
        if number is not None:
            self._predicted.forget(number)
            self._in_flight.forget(number)
            self._numbers.release(number)
        self._count_live()

    def keep_only(self, workers: Mapping[str, int]) -> None:
        """Forget workers that are not in the table, name to generation, or were started again."""
        for name in list(self._workers):
            if name not in workers:
                self.forget(name)
        for (name, _), source in list(self._sources.items()):
            # An engine announces blocks before it is in rotation, so a source may be ahead of the table.
            if source.generation < workers.get(name, source.generation):
                self.forget(name)

    # What is told about it.

    @property
    def hears(self) -> bool:
        """Engines tell what they hold: what a prompt's text is in their blocks is worth knowing."""
        return bool(self._sources)

    @property
    def live(self) -> Collection[str]:
        """Workers whose engines' events are followed; for others, predictions stand in."""
        silent = {name for (name, _), source in self._sources.items() if source.silent or not source.live}
        return {name for name, _ in self._sources} - silent

    def stats(self) -> dict[str, int]:
        """Sizes, for the metrics."""
        live = self.live
        return {
            "units": len(self._holders),
            "units_evicted": self._holders.evicted,
            "predicted": len(self._predicted),
            "predicted_evicted": self._predicted.evicted,
            "translations": len(self._translation),
            "live_sources": sum(name in live for name, _ in self._sources),
            "silent_sources": sum(name not in live for name, _ in self._sources),
        }

    # The rest is how.

    def _number(self, worker: str) -> int:
        number = self._workers.get(worker)
        if number is None:
            number = self._workers[worker] = self._take_number(worker)
            self._count_live()
        return number

    def _take_number(self, worker: str) -> int:
        while self._holders.forgotten and self._numbers.full:
            self._holders.sweep()
        return self._numbers.take(worker)

    def _predict(self, worker: str, chain: Sequence[int], chunk_tokens: float, now: float) -> int:
        """Returns how many leading chunks were predicted somewhere before."""
        number = self._number(worker)
        seen = self._predicted.add(number, chain, chunk_tokens)
        if self._live_workers >> number & 1:
            self._in_flight.add(number, chain, now)
        self._holders.sweep()
        return seen

    def _take(self, message: SharedMessage, now: float) -> None:
        for worker, chunk_tokens, packed in message.placed:
            if worker in self._workers and packed:
                self._predict(worker, tuple(unpack(packed)), chunk_tokens, now)
        pairs = unpack(message.learned)
        self._translation.take(list(zip(pairs[::2], pairs[1::2], strict=True)))

    def _source(self, message: KvMessage) -> _Source | None:
        """None for news of an engine that has ended meanwhile."""
        key = (message.worker, message.source)
        source = self._sources.get(key)
        if source is not None and message.generation < source.generation:
            return None
        if source is not None and message.generation > source.generation:
            self.forget(message.worker)
            source = None
        if source is None:
            source = _Source(self._take_number(message.worker), message.generation)
            self._sources[key] = source
        return source

    def _in_order(self, source: _Source, message: KvMessage) -> bool:
        if message.seq == 0:
            source.next, source.live = 0, False
            self._clear(source, message.worker)
        if message.seq == source.next:
            source.next += 1
            return True
        if source.next > 0:
            log.warning(
                "news about the KV cache of %s is missing: it is predicted until all was told again",
                message.worker,
            )
        if source.next != _WAITING:
            source.next = _WAITING
            source.live = False
            self._count_live()
            self.missing = True
        return False

    def _heard(self, source: _Source, worker: str) -> None:
        self._quiet.pop(worker, None)
        if source.silent:
            source.silent = False
            self._count_live()

    def _operate(self, source: _Source, worker: str, op: Op) -> None:
        name, tier, packed = op
        if name == "store":
            source.told = True
            self._holders.put(unpack(packed), source.number, tier)
        elif name == "drop":
            self._holders.drop(unpack(packed), source.number)
        elif name == "clear":
            self._clear(source, worker)
        else:
            source.live = name == "live"
            if source.live:
                self._number(worker)
            self._count_live()

    def _clear(self, source: _Source, worker: str) -> None:
        if source.told:
            self._retire(source.number)
            source.number = self._take_number(worker)
            source.told = False
        self._count_live()

    def _retire(self, number: int) -> None:
        self._holders.forget(number)
        self._numbers.release(number)

    def _count_live(self) -> None:
        self._bits_of.clear()
        self._live_sources = self._live_workers = 0
        live = self.live
        for (name, _), source in self._sources.items():
            if name in live:
                self._live_sources |= 1 << source.number
                if name in self._workers:
                    self._live_workers |= 1 << self._workers[name]
