"""Predicted caches lose chunks in the order of a list of single chunks, whatever runs they are kept in."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcserve.http.compiled import compiled
from hpcserve.router.kv import predicted as reference
from hpcserve.router.kv.predicted import Predicted

CHUNK_TOKENS = 100.0

marks = compiled("router.kv.marks", "a test")
assert marks is not None, "`make venv` compiles it, with a C compiler and Python's headers"


class OneByOne:
    """What Predicted says it is: for each worker, a list of its least recently used chunks."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.caches: dict[int, OrderedDict[int, None]] = {}
        self.capacity: dict[int, int] = {}

    def add(self, number: int, chain: tuple[int, ...]) -> int:
        held = {chunk for cache in self.caches.values() for chunk in cache}
        seen = next((at for at, chunk in enumerate(chain) if chunk not in held), len(chain))
        cache = self.caches.setdefault(number, OrderedDict())
        for chunk in reversed(chain):
            cache[chunk] = None
            cache.move_to_end(chunk)
        self._shrink(cache, self.capacity.get(number, 5000))
        if sum(map(len, self.caches.values())) > self.most:
            self._shrink(cache, max(self.most // len(self.caches), 1))
        return seen

    def _shrink(self, cache: OrderedDict[int, None], most: int) -> None:
        while len(cache) > most:
            cache.popitem(last=False)

    @property
    def masks(self) -> dict[int, int]:
        masks: dict[int, int] = {}
        for number, cache in self.caches.items():
            for chunk in cache:
                masks[chunk] = masks.get(chunk, 0) | 1 << number
        return masks


def chain(turns: list[int], length: int) -> tuple[int, ...]:
    """Three chunks of each turn, cut at `length`; equal beginnings have equal chunks, nothing else has."""
    chunks, before = [], 1
    for turn in turns:
        for _ in range(3):
            before = before * 7 + turn + 1
            chunks.append(before)
    return tuple(chunks[:length])


workers = st.integers(0, 2)
prompts = st.builds(chain, st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(1, 18))
steps = st.one_of(
    st.tuples(st.just("add"), workers, prompts),
    st.tuples(st.just("add"), workers, prompts),
    st.tuples(st.just("add"), workers, prompts),
    st.tuples(st.just("capacity"), workers, st.integers(1, 30)),
    st.tuples(st.just("forget"), workers, st.none()),
)


@pytest.fixture(params=["python", "compiled"], scope="module")
def loops(request: pytest.FixtureRequest) -> Iterator[None]:
    """Either way of going over a prompt's chunks."""
    module = reference if request.param == "python" else marks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_way", lambda: module)
        yield


@settings(max_examples=300)
@given(told=st.lists(steps, max_size=60), most=st.integers(1, 80))
def test_chunks_go_in_the_order_of_their_last_use(
    loops: None, told: list[tuple[str, int, object]], most: int
) -> None:
    predicted, model = Predicted(most=most), OneByOne(most)
    for what, number, value in told:
        if what == "add":
            assert isinstance(value, tuple)
            assert predicted.add(number, value, CHUNK_TOKENS) == model.add(number, value)
        elif what == "capacity":
            assert isinstance(value, int)
            predicted.capacity(number, value * CHUNK_TOKENS)
            model.capacity[number] = value
        else:
            predicted.forget(number)
            model.caches.pop(number, None)
            model.capacity.pop(number, None)
        assert dict(predicted.items()) == model.masks
        assert len(predicted) == sum(map(len, model.caches.values()))
        for number, cache in predicted._caches.items():
            # Every chunk is in one run, and every run is found by its first chunk.
            runs = cache.runs
            assert sorted(chunk for run in runs.values() for chunk in run) == sorted(model.caches[number])
            assert cache.first == {run[0]: name for name, run in runs.items()}


@given(told=st.lists(st.tuples(workers, st.lists(st.integers(0, 9), min_size=1, max_size=6)), max_size=60))
def test_hashes_that_are_the_same_by_chance_break_nothing(
    loops: None, told: list[tuple[int, list[int]]]
) -> None:
    predicted = Predicted(most=30)
    for number in range(3):
        predicted.capacity(number, 8 * CHUNK_TOKENS)
    for number, chunks in told:
        predicted.add(number, tuple(chunks), CHUNK_TOKENS)
        assert len(predicted) == sum(mask.bit_count() for _, mask in predicted.items()) <= 24
    for number in range(3):
        predicted.forget(number)
    assert len(predicted) == 0 and not predicted.items()


numbers = st.sampled_from((0, 1, 2, 62, 63, 64, 511, 8191))
chunks = st.integers(0, 12) | st.integers((1 << 64) - 3, (1 << 64) - 1) | st.integers(0, (1 << 64) - 1)
chains = st.lists(chunks, max_size=9)


@given(
    st.lists(st.tuples(st.sampled_from(("mark", "unmark", "leading")), chains, numbers, st.integers(0, 9)))
)
def test_compiled_marks_are_those_of_python(told: list[tuple[str, list[int], int, int]]) -> None:
    ours, theirs = marks.Marks(), reference.Marks()
    for what, chain, number, most in told:
        most = min(most, len(chain))
        compiled_chain = marks.Chain(chain)
        if what == "leading":
            for of in (number, None):
                assert ours.leading(compiled_chain, of, most) == theirs.leading(chain, of, most)
        else:
            found = getattr(ours, what)(compiled_chain, most, number)
            assert found == getattr(theirs, what)(chain, most, number)
        assert dict(ours.items()) == dict(theirs.items())
        assert len(ours) == len(theirs)
        for chunk in chain:
            assert ours.get(chunk) == theirs.get(chunk, 0)
            assert ours.get(chunk, None) == theirs.get(chunk)


def test_a_table_of_many_chunks_keeps_them_all_and_lets_go_of_all() -> None:
    ours, dice = marks.Marks(), random.Random(5)
    chain = [dice.getrandbits(64) for _ in range(20_000)]
    assert ours.mark(chain, 0, 3) == len(ours) == 20_000
    assert ours.mark(chain[::2], 0, 700) == 10_000
    assert all(ours.get(chunk) == 8 for chunk in chain[1::2])
    assert all(ours.get(chunk) == 8 | 1 << 700 for chunk in chain[::2])
    assert ours.unmark(chain, 0, 3) == 20_000
    assert len(ours) == 10_000
    assert ours.unmark(chain, 0, 700) == 10_000
    assert len(ours) == 0 and not ours.items()
    assert not any(map(ours.get, chain))


@given(chains, chains, st.integers(0, 9))
def test_what_two_chains_share(run: list[int], chain: list[int], start: int) -> None:
    start = min(start, len(chain))
    for given_chain in (chain, chain[:start] + run, chain[:start] + run[:3] + chain):
        found = marks.shared(marks.Chain(run), marks.Chain(given_chain), start)
        assert found == reference.shared(tuple(run), tuple(given_chain), start)
        assert found == marks.shared(tuple(run), marks.Chain(given_chain), start)


@given(chains, st.integers(-12, 12), st.integers(-12, 12))
def test_a_chain_is_a_sequence(given_chain: list[int], start: int, stop: int) -> None:
    chain, as_tuple = marks.Chain(given_chain), tuple(given_chain)
    assert chain == as_tuple and as_tuple == chain
    assert list(chain) == given_chain and len(chain) == len(given_chain) and bool(chain) == bool(given_chain)
    assert repr(chain) == repr(as_tuple) and hash(chain) == hash(marks.Chain(given_chain))
    assert chain[start:stop] == as_tuple[start:stop] and chain[start:] == as_tuple[start:]
    assert chain != (*as_tuple, 1) and (chain != as_tuple[:-1] or not chain)
    assert not (chain != as_tuple)  # noqa: SIM202 - it is another operator
    if -len(chain) <= start < len(chain):
        assert chain[start] == as_tuple[start]
    else:
        with pytest.raises(IndexError):
            chain[start]


def test_a_chunk_has_64_bits() -> None:
    with pytest.raises(OverflowError):
        marks.Chain([1 << 64])
    with pytest.raises(OverflowError):
        marks.Marks().mark((-1,), 0, 0)
