"""The order of work in numbers: prefixes together, long rows first, both pools busy, groups not too large."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcserve.batch.order import LEVELS, PREFIX_BYTES, Counts, prefix_marks, work_order

BLOCK = 64
"""Bytes of a prompt in one block of the simulated cache: 16 tokens."""


@dataclass
class Cache:
    """A prefix cache as engines have it: blocks of a prompt in a chain, the least recently used one goes."""

    blocks: int
    held: OrderedDict[int, None] = field(default_factory=OrderedDict)
    hits: int = 0
    computed: int = 0

    def serve(self, chain: Sequence[int]) -> None:
        cached = True
        for block in chain:
            cached = cached and block in self.held
            self.hits += cached
            self.computed += not cached
            self.held[block] = None
            self.held.move_to_end(block)
        while len(self.held) > self.blocks:
            self.held.popitem(last=False)


def chain(text: bytes) -> list[int]:
    """Numbers of a prompt's blocks: equal ones mean equal text up to there."""
    blocks, before = [], 0
    for end in range(BLOCK, len(text) + 1, BLOCK):
        before = hash((before, text[end - BLOCK : end]))
        blocks.append(before)
    return blocks


def hit_rate(texts: Sequence[bytes], order: Iterable[int], *, blocks: int) -> float:
    cache = Cache(blocks)
    for row in order:
        cache.serve(chain(texts[row]))
    return cache.hits / (cache.hits + cache.computed)


def counts(values: Any) -> Counts:
    return np.asarray(values, np.uint32)


def no_marks(rows: int) -> Counts:
    return np.zeros((rows, LEVELS), np.uint32)


def marks_of(texts: Sequence[bytes]) -> Counts:
    return counts([prefix_marks(text) for text in texts])


def alone(prompt: Counts, output: Counts, *, in_flight: int = 1024) -> Counts:
    """The order of rows without a shared prefix."""
    return work_order(
        prompt, output, no_marks(len(prompt)), group_limit=256, prefix=True, in_flight=in_flight
    )


def makespan(durations: Sequence[float], slots: int) -> float:
    """When the last row ends, if each starts as soon as one of the slots is free."""
    free = [0.0] * slots
    for duration in durations:
        heapq.heappush(free, heapq.heappop(free) + duration)
    return max(free)


def visits(prefixes: Sequence[int], *, held: int) -> int:
    """How often a prefix has to be computed by a cache of so many whole prefixes."""
    cache = Cache(held)
    for prefix in prefixes:
        cache.serve([prefix])
    return cache.computed


def ratio_in_windows(order: Counts, prompt: Counts, output: Counts, *, rows: int) -> np.ndarray[Any, Any]:
    """Tokens of prompts by tokens of answers in each window, relative to that of all rows."""
    whole = len(order) // rows * rows
    prompts = prompt[order][:whole].reshape(-1, rows).sum(axis=1)
    outputs = output[order][:whole].reshape(-1, rows).sum(axis=1)
    return np.asarray(prompts / outputs / (prompt.sum() / output.sum()))


# Marks


def test_marks_are_equal_as_far_as_texts_are() -> None:
    one, other = b"a" * 3000, b"a" * 2000 + b"b" * 1000
    assert PREFIX_BYTES == (256, 512, 1024, 2048, 4096, 8192)
    assert prefix_marks(one)[:3] == prefix_marks(other)[:3]
    assert prefix_marks(one)[3] != prefix_marks(other)[3]
    assert prefix_marks(one)[4:] == (0, 0)


def test_a_prompt_shorter_than_the_first_level_has_no_mark() -> None:
    assert prefix_marks(b"a" * 255) == (0,) * LEVELS
    assert prefix_marks(b"a" * 256)[0] != 0


def test_a_mark_depends_on_all_bytes_before_it() -> None:
    tail = b"t" * 8192
    assert prefix_marks(b"a" + tail)[5] != prefix_marks(b"b" + tail)[5]


# Always


rows_strategy = st.lists(
    st.tuples(
        st.integers(0, 5000), st.integers(0, 2**32 - 1) | st.integers(0, 50), st.integers(0, 3),
        st.integers(0, 3), st.integers(0, LEVELS),
    ),
    max_size=60,
)  # fmt: skip


def tree_marks(rows: Sequence[tuple[int, int, int, int, int]]) -> Counts:
    """Marks of prompts out of a tree: two choices, and a length in levels."""
    marks = no_marks(len(rows))
    for row, (_, _, system, document, levels) in enumerate(rows):
        for level in range(levels):
            marks[row, level] = 1 + system if level < 3 else 100 + 10 * system + document
    return marks


@given(rows=rows_strategy, limit=st.integers(1, 70), prefix=st.booleans(), in_flight=st.integers(1, 100))
def test_every_row_is_in_the_order_once(
    rows: list[tuple[int, int, int, int, int]], limit: int, prefix: bool, in_flight: int
) -> None:
    prompt, output = counts([row[0] for row in rows]), counts([row[1] for row in rows])
    marks = tree_marks(rows)
    order = work_order(prompt, output, marks, group_limit=limit, prefix=prefix, in_flight=in_flight)
    assert sorted(order.tolist()) == list(range(len(rows)))
    again = work_order(prompt, output, marks, group_limit=limit, prefix=prefix, in_flight=in_flight)
    assert order.tolist() == again.tolist()


def test_arguments_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="3 prompts, 2 answers"):
        work_order(counts([1, 2, 3]), counts([1, 2]), no_marks(3), group_limit=2, prefix=True)
    with pytest.raises(ValueError, match="group_limit is 0"):
        work_order(counts([1]), counts([1]), no_marks(1), group_limit=0, prefix=True)


# Prefixes


@dataclass(frozen=True)
class Shuffled:
    """50 system prompts of 1500 bytes with 200 questions each, in any order."""

    texts: list[bytes]
    prefixes: np.ndarray[Any, Any]
    prompt: Counts
    output: Counts

    def order(self, *, limit: int = 200, prefix: bool = True, in_flight: int = 128) -> Counts:
        return work_order(
            self.prompt, self.output, marks_of(self.texts),
            group_limit=limit, prefix=prefix, in_flight=in_flight,
        )  # fmt: skip


@pytest.fixture(scope="module")
def shuffled() -> Shuffled:
    random = np.random.default_rng(7)
    prefixes = random.permutation(np.repeat(np.arange(50), 200))
    systems = [random.bytes(1500) for _ in range(50)]
    texts = [systems[prefix] + random.bytes(int(random.integers(50, 600))) for prefix in prefixes]
    output = counts(random.lognormal(5, 0.7, len(texts)))
    return Shuffled(texts, prefixes, counts([len(text) // 4 for text in texts]), output)


def test_a_prefix_is_computed_once_by_a_cache_that_holds_few(shuffled: Shuffled) -> None:
    order = shuffled.order()
    assert visits(shuffled.prefixes[order].tolist(), held=6) <= 53
    assert visits(shuffled.prefixes.tolist(), held=6) > 8000
    places = np.argsort(order)
    spans = [int(np.ptp(places[shuffled.prefixes == prefix])) for prefix in range(50)]
    assert np.median(spans) <= 500, "200 rows, and those of the other queue between them"


def test_a_small_block_cache_hits_in_prefix_order_only(shuffled: Shuffled) -> None:
    """82 % of all blocks can be hits. The cache holds 2 % of the distinct ones."""
    blocks = 16 * BLOCK
    texts = shuffled.texts
    ours = hit_rate(texts, shuffled.order().tolist(), blocks=blocks)
    as_given = hit_rate(texts, range(len(texts)), blocks=blocks)
    random = np.random.default_rng(3).permutation(len(texts)).tolist()
    best = hit_rate(texts, range(len(texts)), blocks=1 << 30)
    assert ours > 0.98 * best
    assert as_given < 0.9 * best
    assert hit_rate(texts, random, blocks=blocks) < 0.9 * best
    without = shuffled.order(prefix=False).tolist()
    assert hit_rate(texts, without, blocks=blocks) < 0.9 * best, "the difference is made by prefixes"


def test_documents_below_a_prompt_stay_together_within_their_group() -> None:
    """20 system prompts x 10 documents x 10 questions, groups as large as a system prompt's rows."""
    random = np.random.default_rng(5)
    document = random.permutation(np.repeat(np.arange(200), 10))
    marks = no_marks(2000)
    marks[:, :3] = (1 + document // 10)[:, None]
    marks[:, 3:] = (1000 + document)[:, None]
    prompt, output = counts(random.integers(2100, 2200, 2000)), counts(random.lognormal(5, 0.5, 2000))
    order = work_order(prompt, output, marks, group_limit=100, prefix=True, in_flight=16)
    assert visits((document // 10)[order].tolist(), held=4) <= 22
    assert visits(document[order].tolist(), held=20) <= 210


@pytest.mark.parametrize("limit", [2, 3, 10, 31, 32, 33, 64, 127])
def test_no_more_rows_of_one_prefix_in_a_row_than_a_group_has(limit: int) -> None:
    """Four prefixes, each too common for one group: replicas find work on several at once."""
    prefixes = np.repeat(np.arange(4), 128)
    marks = no_marks(512)
    marks[:, 0] = 1 + prefixes
    order = work_order(counts([400] * 512), counts([100] * 512), marks, group_limit=limit, prefix=True)
    stretches = np.diff(np.flatnonzero(np.diff(prefixes[order], prepend=-1, append=-1)))
    # As many pieces as it takes, of about the same size; one of each prefix after the other.
    assert stretches.max() <= limit
    assert len(set(prefixes[order][: 4 * limit].tolist())) == 4


def test_a_window_of_rows_in_flight_has_several_groups_whatever_the_lengths_are() -> None:
    random = np.random.default_rng(10)
    prefixes = random.permutation(np.repeat(np.arange(8), 1000))
    marks = no_marks(8000)
    marks[:, 0] = 1 + prefixes
    output = counts(random.lognormal(5, 1, 8000))
    order = work_order(np.full(8000, 400, np.uint32), output, marks, group_limit=50, prefix=True)
    windows = prefixes[order].reshape(-1, 400)
    assert min(len(set(window.tolist())) for window in windows) >= 4
    assert visits(prefixes[order].tolist(), held=6) < 8000 / 50 * 3, "and yet a prefix serves many rows"


def test_a_prefix_that_all_rows_have_is_none() -> None:
    random = np.random.default_rng(2)
    prompt, output = counts(random.lognormal(6, 1, 5000)), counts(random.lognormal(5, 1, 5000))
    marks = no_marks(5000)
    bare = work_order(prompt, output, marks, group_limit=64, prefix=True)
    marks[:, 0] = 9
    common = work_order(prompt + 64, output, marks, group_limit=64, prefix=True)
    # But for the one row that computes it.
    assert np.mean(np.abs(np.argsort(bare) - np.argsort(common))) < 10


# Long rows


@pytest.mark.parametrize("place", [0, 31_000, 99_999])
@pytest.mark.parametrize("kind", ["answer", "prompt"])
def test_a_row_that_is_100_times_longer_costs_no_tail(place: int, kind: str) -> None:
    prompt, output = np.full(100_000, 500, np.uint32), np.full(100_000, 100, np.uint32)
    {"answer": output, "prompt": prompt}[kind][place] *= 100
    order = alone(prompt, output)
    assert place in order[:2], "the first of its queue"
    durations = (output + prompt / 64)[order]
    assert makespan(durations.tolist(), 1024) < 1.02 * durations.sum() / 1024


def test_without_shared_prefixes_the_longest_rows_of_either_kind_come_first() -> None:
    random = np.random.default_rng(1)
    output = counts(random.lognormal(5, 1, 20_000))
    prompt = np.full(20_000, 300, np.uint32)
    ordered = output[alone(prompt, output)]
    for queue in (ordered > output.mean(), ordered < output.mean()):
        lengths = ordered[queue].astype(int)
        # But for the end, where long rows move forward.
        assert (np.diff(lengths)[: len(lengths) * 8 // 10] <= 0).all()


def test_a_few_very_long_rows_all_start_in_time_though_a_balance_would_spread_them() -> None:
    """20 rows of 2000 have half of all tokens."""
    output = np.full(2000, 300, np.uint32)
    output[::100] = 30_000
    prompt = np.full(2000, 300, np.uint32)
    order = alone(prompt, output, in_flight=256)
    assert (output[order[:20]] == 30_000).all()


@pytest.mark.parametrize(("rows", "slots"), [(10_000, 256), (10_000, 1024), (50_000, 512)])
def test_the_tail_is_short_with_prefixes_and_lengths_of_all_kinds(rows: int, slots: int) -> None:
    random = np.random.default_rng(4)
    prefixes = random.permutation(np.arange(rows) % 50)
    marks = no_marks(rows)
    marks[:, :3] = 1 + prefixes[:, None]
    prompt = counts(random.integers(700, 900, rows))
    output = counts(random.lognormal(5, 1, rows))
    order = work_order(prompt, output, marks, group_limit=256, prefix=True, in_flight=slots)
    durations = output + prompt / 64
    least = max(float(durations.max()), float(durations.sum()) / slots)
    assert makespan(durations[order].tolist(), slots) < 1.03 * least
    visited = visits(prefixes[order].tolist(), held=20)
    assert visited < rows * 0.01 + 200, "prefixes are together all the same"


def test_in_a_group_the_longest_row_goes_early() -> None:
    """A dataset that is one group."""
    marks = no_marks(400)
    marks[:, 0] = 1
    output = np.full(400, 50, np.uint32)
    output[333] = 5000
    order = work_order(np.full(400, 200, np.uint32), output, marks, group_limit=512, prefix=True)
    assert order[0] == 333


# Both pools


@pytest.mark.parametrize("correlation", [-1, 0, 1])
def test_any_window_has_the_ratio_of_the_whole(correlation: int) -> None:
    random = np.random.default_rng(6)
    normal = random.normal(size=40_000)
    other = correlation * normal if correlation else random.normal(size=40_000)
    prompt, output = counts(np.exp(6 + normal)), counts(np.exp(5 + 0.7 * other))
    order = alone(prompt, output, in_flight=512)
    windows = ratio_in_windows(order, prompt, output, rows=500)[:-4]
    assert windows.min() > 0.95 and windows.max() < 1.05
    by_length = np.argsort(-output.astype(int))
    sorted_windows = ratio_in_windows(by_length, prompt, output, rows=500)
    if correlation <= 0:
        assert sorted_windows.max() > 2.0, "an order by length alone has no balance"


def test_groups_of_different_kinds_are_blended() -> None:
    """Half of the prefixes have long answers: each window has its part of them."""
    random = np.random.default_rng(8)
    prefixes = random.permutation(np.repeat(np.arange(40), 100))
    marks = no_marks(4000)
    marks[:, 0] = 1 + prefixes
    output = counts(np.where(prefixes % 2, 1000, 20) + random.integers(0, 10, 4000))
    prompt = np.full(4000, 264, np.uint32)
    order = work_order(prompt, output, marks, group_limit=100, prefix=True, in_flight=64)
    windows = ratio_in_windows(order, prompt, output, rows=200)[:-2]
    assert windows.min() > 0.9 and windows.max() < 1.1
    assert visits(prefixes[order].tolist(), held=4) <= 44


def test_a_prefix_that_is_cached_counts_once() -> None:
    """Long prompts, of which nearly all is shared, are work for decode."""
    marks = no_marks(2000)
    marks[:1000] = (1 + np.arange(1000) // 100)[:, None]
    prompt = np.full(2000, 2148, np.uint32)  # 100 tokens more than the last level
    output = np.full(2000, 200, np.uint32)
    order = work_order(prompt, output, marks, group_limit=100, prefix=True, in_flight=16)
    alone_first_half = np.mean(order[:1000] >= 1000)
    assert 0.4 < alone_first_half < 0.6, "rows that share and rows that do not are mixed"


def test_rows_without_answers_are_ordered_by_their_prompts() -> None:
    prompt = counts([5, 9, 1, 7])
    assert alone(prompt, counts([0, 0, 0, 0]), in_flight=1).tolist() == [1, 3, 0, 2]


def test_rows_that_are_all_alike_keep_their_order() -> None:
    assert alone(np.full(50, 10, np.uint32), np.full(50, 10, np.uint32)).tolist() == list(range(50))


def test_blending_in_parts_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(9)
    prompt, output = counts(random.lognormal(6, 1, 3000)), counts(random.lognormal(5, 1, 3000))
    marks = no_marks(3000)
    marks[:, 0] = 1 + np.arange(3000) % 70
    whole = work_order(prompt, output, marks, group_limit=32, prefix=True)
    monkeypatch.setattr("hpcserve.batch.order._CHUNK", 40)
    parts = work_order(prompt, output, marks, group_limit=32, prefix=True)
    # Sums of floats round in another way: neighbours may change places.
    assert np.abs(np.argsort(parts) - np.argsort(whole)).max() <= 2
