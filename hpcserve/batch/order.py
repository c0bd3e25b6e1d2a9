"""In which order rows are sent: shared prefixes together, long rows first, both pools busy all the time.

Groups    Rows that share the first bytes of their prompts are a group, so that a cache of modest size has to
          compute a prefix once. A group has at most `group_limit` rows, or one replica would work while
          others wait; a more common prefix is cut into pieces, and costs one computation more for each.
Longest   Groups that hold a long row go first, and long rows go first in their group: what starts last is
          what all the others wait for at the end.
Blend     Prompts are the work of prefill, answers that of decode, and an order by prefix or by length alone
          keeps one of them waiting. So groups stand in two queues, by which of the two they have more of than
          the whole, and rows are taken from both such that the sums of both kinds of tokens grow alike; rows
          inside of a group likewise. A shared prefix is counted once: a cached token is no work.
Tail      A balance that would start a row so late that it ends after all others is not worth its price: such
          a row moves forward. It concerns about the last `in_flight` rows, and all of a small dataset.

BlendServe (arXiv 2411.16102) scans a tree of prefixes from both of its ends; with two queues their order is
free, and can be longest first. BatchLLM (arXiv 2412.03594) keeps the rows of a prefix together and starts
with decode-heavy groups. What is given up here: at any time two groups are open instead of one, long rows
that move forward visit their prefix apart from their group, and within a group a smaller one may be visited
twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

PREFIX_BYTES = (256, 512, 1024, 2048, 4096, 8192)
LEVELS = len(PREFIX_BYTES)
IN_FLIGHT = 1024
"""Rows that a deployment answers at once, where nobody says: the usual limit of a few replicas."""
BYTES_PER_TOKEN = 4
PROMPT_PER_OUTPUT = 64
"""Tokens of a prompt that take as long as one of an answer: 10,000 a second against 150 in one stream."""

_CHUNK = 1 << 18
"""Rows that are blended inside of their groups at once, to save memory."""

Counts = npt.NDArray[np.uint32]
"""One for each row: a number of tokens, a mark, a row, a place in an order."""
Shares = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]


def prefix_marks(text: bytes) -> tuple[int, ...]:
    """32-bit hashes of the first 256, 512, … 8192 bytes of a prompt; 0 where it is shorter.

    Two of 10 million rows may share a mark by chance: they stand together then, and nothing else happens.
    """
    marks = [0] * LEVELS
    mark = begin = 0
    for level, end in enumerate(PREFIX_BYTES):
        if len(text) < end:
            break
        mark = marks[level] = (xxh3_64_intdigest(text[begin:end], mark) & 0xFFFFFFFF) or 1
        begin = end
    return tuple(marks)


def work_order(
    prompt_tokens: Counts,
    output_tokens: Counts,
    marks: Counts,
    *,
    group_limit: int,
    prefix: bool,
    in_flight: int = IN_FLIGHT,
) -> Counts:
    """The numbers of all rows, each once, in the order to send them. The same arguments give the same order.

    `marks` has a row of `prefix_marks` for each row; without `prefix` they do not matter. `group_limit` and
    `in_flight` are rows. `output_tokens` are expected ones; 0 for all of them is fine.
    """
    count = len(prompt_tokens)
    if len(output_tokens) != count or marks.shape != (count, LEVELS):
        raise ValueError(f"{count} prompts, {len(output_tokens)} answers and marks of shape {marks.shape}")
    if group_limit < 1 or in_flight < 1:
        raise ValueError(f"group_limit is {group_limit} and in_flight {in_flight}: both are at least 1")
    if count == 0:
        return np.zeros(0, np.uint32)
    if prefix:
        rows, shared = _by_prefix(marks)
    else:
        rows, shared = np.arange(count, dtype=np.uint32), np.zeros(count, np.uint8)
    prompt, output = _computed(prompt_tokens[rows], shared, group_limit), output_tokens[rows]
    places, ends = _grouped(shared, prompt, output, group_limit)
    rows, prompt, output = rows[places], prompt[places], output[places]
    del places, shared
    times = _blended(rows, prompt, output, ends)
    mixed = np.argsort(times, kind="stable")
    rows, prompt, output = rows[mixed], prompt[mixed], output[mixed]
    del times, mixed
    return rows[_tail_first(_duration(prompt, output), in_flight)]


def _by_prefix(marks: Counts) -> tuple[Counts, npt.NDArray[np.uint8]]:
    """Rows such that equal prefixes are neighbours, and how many levels each shares with the one before."""
    levels = [level for level in range(LEVELS) if marks[:, level].any()]
    if not levels:
        return np.arange(len(marks), dtype=np.uint32), np.zeros(len(marks), np.uint8)
    rows = np.lexsort([marks[:, level] for level in reversed(levels)]).astype(np.uint32)
    shared = np.zeros(len(rows), np.uint8)
    same = np.ones(len(rows) - 1, bool)
    for level in levels:
        column = marks[:, level][rows]
        same &= (column[1:] == column[:-1]) & (column[1:] != 0)
        shared[1:] += same
    return rows, shared


def _computed(prompt: Counts, shared: npt.NDArray[np.uint8], limit: int) -> Counts:
    """Tokens to compute for each prompt: those of a shared prefix once in a group, divided among its rows."""
    cached = np.zeros(len(prompt), np.uint32)
    for level, tokens in enumerate(np.diff([0, *PREFIX_BYTES]) // BYTES_PER_TOKEN):
        begins, ends = _runs(shared, level)
        if not len(begins):
            break
        sizes = ends - begins
        saved = tokens - tokens * -(-sizes // limit) // sizes
        cached[_spread(begins, ends, len(prompt))] += np.repeat(saved.astype(np.uint32), sizes)
    np.minimum(prompt, cached, out=cached)
    return np.subtract(prompt, cached, out=cached)


def _duration(prompt: Counts, output: Counts) -> Counts:
    """How long an answer takes, in the time that a token of a prompt takes."""
    # Within 32 bits, whatever anyone expects.
    duration = np.minimum(output, np.uint32(1 << 25))
    duration *= np.uint32(PROMPT_PER_OUTPUT)
    duration += np.minimum(prompt, np.uint32(1 << 30))
    return duration


# Groups


def _grouped(
    shared: npt.NDArray[np.uint8], prompt: Counts, output: Counts, limit: int
) -> tuple[Counts, Places]:
    """The rows' places, group by group, and where each group ends in that order.

    First the queue of groups with more than their share of the answers, then that of the others; in both
    the group with the longest row first.
    """
    duration = _duration(prompt, output)
    begins, parents = _units(shared, limit)
    longest = np.maximum.reduceat(duration, begins)
    group, piece = _packed(begins, len(shared), parents, longest, limit)
    del parents
    most = np.zeros(len(piece), np.uint32)
    np.maximum.at(most, group, longest)
    del longest  # 40 MB of 10 million rows, as are all that go early here
    surplus = np.bincount(group, np.add.reduceat(_surplus(prompt, output), begins))
    # Of equally long groups one from each prefix, then the second of each: replicas work on several.
    ranks = np.lexsort((piece, ~most, surplus < 0.0))
    del surplus, most
    turn = np.empty(len(piece), np.uint32)
    turn[ranks] = np.arange(len(ranks), dtype=np.uint32)
    del ranks
    unit_rows = np.diff(begins, append=len(shared))
    sizes = np.zeros(len(piece), np.intp)
    np.add.at(sizes, turn[group], unit_rows)
    turns = np.repeat(turn[group], unit_rows)
    del begins, group, piece, turn, unit_rows
    places = _longest_first(shared, duration)
    places = places[np.argsort(turns[places], kind="stable")]
    return places, np.cumsum(sizes)


def _surplus(prompt: Counts, output: Counts) -> Shares:
    """Each row's part of all answers less its part of all prompts: above 0 it is work for decode first."""
    surplus = output / max(1, int(output.sum(dtype=np.int64)))
    surplus -= prompt / max(1, int(prompt.sum(dtype=np.int64)))
    return surplus


def _runs(shared: npt.NDArray[np.uint8], level: int) -> tuple[Places, Places]:
    """Begin and end of each run of two or more rows that share the prefix of this level."""
    inside = np.zeros(len(shared) + 1, np.int8)
    inside[:-1] = shared > level
    steps = np.diff(inside)  # the first row of a run is the one before those that share
    return np.flatnonzero(steps == 1), np.flatnonzero(steps == -1) + 1


def _spread(begins: Places, ends: Places, count: int) -> npt.NDArray[np.bool_]:
    """Which rows are inside of these runs."""
    steps = np.zeros(count + 1, np.int8)
    steps[begins] += 1
    steps[ends] -= 1
    return np.cumsum(steps[:-1], dtype=np.int8).astype(bool)


def _units(shared: npt.NDArray[np.uint8], limit: int) -> tuple[Places, Counts]:
    """Where each unit begins: the largest runs of a common prefix that a group holds, else single rows.

    And of each unit what holds it: the smallest prefix too common for one group, as a number; 0 for none.
    """
    count = len(shared)
    first = np.ones(count, bool)
    done = np.zeros(count, bool)
    parents = np.zeros(count, np.uint32)
    for level in range(LEVELS):
        begins, ends = _runs(shared, level)
        if not len(begins):
            break
        sizes = ends - begins
        fits = (sizes <= limit) & ~done[begins]
        inner = _spread(begins[fits], ends[fits], count)
        done |= inner
        first &= ~inner
        first[begins[fits]] = True
        # What most rows share is in every cache all the time, and holds nothing together.
        large = (sizes > limit) & (2 * sizes <= count)
        parents[_spread(begins[large], ends[large], count)] = np.repeat(begins[large] + 1, sizes[large])
    begins = np.flatnonzero(first)
    return begins, parents[begins]


def _packed(
    begins: Places, count: int, parents: Counts, longest: Counts, limit: int
) -> tuple[Counts, Counts]:
    """Of each unit its group, and of each group the how manieth piece of its prefix it is.

    Small units below the same prefix fill a group together, the longest first.
    """
    sizes = np.diff(begins, append=count).astype(np.uint32)
    leader = np.arange(len(begins), dtype=np.uint32)
    piece = np.zeros(len(begins), np.uint32)
    small = leader[(parents > 0) & (sizes <= max(1, limit // 2))]
    if len(small):
        small = small[np.lexsort((~longest[small], parents[small]))]
        sizes = sizes[small]
        heads = np.flatnonzero(np.diff(parents[small], prepend=np.uint32(0)))
        family = np.diff(heads, append=len(small))
        rows = np.add.reduceat(sizes, heads, dtype=np.int64)
        # A unit that begins inside of a stretch may end behind it, by all but one of its rows.
        stretch = limit + 1 - np.maximum.reduceat(sizes, heads).astype(np.int64)
        stretch = -(-rows // -(-rows // stretch))  # all pieces about as large as each other
        nth = np.cumsum(sizes, dtype=np.uint32) - sizes
        nth -= np.repeat(nth[heads], family)
        nth //= np.repeat(stretch.astype(np.uint32), family)
        piece[small] = nth
        new = np.ones(len(small), bool)
        new[1:] = nth[1:] != nth[:-1]
        new[heads] = True
        del nth, sizes
        first = np.flatnonzero(new)
        leader[small] = np.repeat(small[first], np.diff(first, append=len(small)))
    leads = leader == np.arange(len(begins), dtype=np.uint32)
    number = np.cumsum(leads, dtype=np.uint32) - np.uint32(1)
    return number[leader], piece[leads]


def _longest_first(shared: npt.NDArray[np.uint8], duration: Counts) -> Counts:
    """Places such that the rows of each prefix stay together, and at each level the longest row leads."""
    places = np.argsort(~duration, kind="stable").astype(np.uint32)
    turn = np.empty(len(places), np.uint32)
    turn[places] = np.arange(len(places), dtype=np.uint32)
    for level in reversed(range(LEVELS)):
        begins, ends = _runs(shared, level)
        if not len(begins):
            continue
        if level:
            above = _runs(shared, level - 1)
            if np.array_equal(begins, above[0]) and np.array_equal(ends, above[1]):
                continue  # the same prefixes, only seen further
        bounds = np.stack((begins, ends), axis=1).ravel()
        first = np.minimum.reduceat(turn, bounds[:-1] if bounds[-1] == len(turn) else bounds)[::2]
        key = turn.copy()
        key[_spread(begins, ends, len(turn))] = np.repeat(first, ends - begins)
        places = places[np.argsort(key[places], kind="stable")]
    return places


# Blend


def _blended(rows: Counts, prompt: Counts, output: Counts, ends: Places) -> Shares:
    """Balance the rows inside of each group, in place; then when to send each, from 0 to 1.

    Groups stand in two queues, one after the other, and each queue's time runs from 0 to 1.
    """
    begins = np.concatenate((np.zeros(1, np.intp), ends[:-1]))
    all_output = max(1, int(output.sum(dtype=np.int64)))
    all_prompt = max(1, int(prompt.sum(dtype=np.int64)))
    surplus = np.add.reduceat(output, begins, dtype=np.int64) / all_output
    surplus -= np.add.reduceat(prompt, begins, dtype=np.int64) / all_prompt
    start, width = _queue_times(surplus)
    del surplus
    times = np.empty(len(rows), np.float64)
    for some in _chunks(ends):
        part = slice(begins[some.start], ends[some.stop - 1])
        sizes = ends[some] - begins[some]
        inner, done = _balanced(prompt[part], output[part], sizes)
        for array in (rows, prompt, output):
            array[part] = array[part][inner]
        times[part] = np.repeat(start[some], sizes) + np.repeat(width[some], sizes) * done
    return times


def _queue_times(surplus: Shares) -> tuple[Shares, Shares]:
    """When each group begins, and how long it takes: in a queue, time is the surplus that was sent."""
    start, width = np.empty_like(surplus), np.abs(surplus)
    for queue in (surplus >= 0.0, surplus < 0.0):
        total = float(width[queue].sum())
        width[queue] /= total or 1.0
        start[queue] = np.cumsum(width[queue]) - width[queue]
    return start, width


def _chunks(ends: Places) -> Iterator[slice]:
    """Slices of groups that have about `_CHUNK` rows each."""
    begin = 0
    while begin < len(ends):
        rows_before = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, rows_before + _CHUNK, side="right")))
        yield slice(begin, end)
        begin = end


def _balanced(prompt: Counts, output: Counts, sizes: Places) -> tuple[Places, Shares]:
    """Places of rows inside of their groups, and the part of its group's work that is sent before each.

    Two queues again: the rows with more than their share of the group's answers, and the others.
    """
    group = np.repeat(np.arange(len(sizes)), sizes)
    begins = np.cumsum(sizes) - sizes
    answers = output / np.maximum(1, np.add.reduceat(output, begins, dtype=np.int64))[group]
    prompts = prompt / np.maximum(1, np.add.reduceat(prompt, begins, dtype=np.int64))[group]
    surplus = answers - prompts
    more, less = np.maximum(surplus, 0.0), np.maximum(-surplus, 0.0)
    sent = np.where(surplus >= 0.0, _before(more, begins, group), _before(less, begins, group))
    inner = np.lexsort((sent, group))
    return inner, _before((answers + prompts)[inner], begins, group) / 2.0


def _before(amounts: Shares, begins: Places, group: Places) -> Shares:
    """The sum of all earlier amounts of the same group."""
    sums = np.cumsum(amounts) - amounts
    sums -= sums[begins][group]
    return sums


# Tail


def _tail_first(duration: Counts, in_flight: int) -> Places:
    """Places, such that no row starts too late to end with the others, if that many are answered at once.

    Later by what an average row takes is not too late: so long the last rows take to end, whatever the order.
    """
    total = max(1, int(duration.sum(dtype=np.int64)))
    times = np.cumsum(duration, dtype=np.float64)
    times -= duration
    times /= total
    latest = duration * (-in_flight / total)
    latest += 1.0 + in_flight / len(duration)
    np.minimum(times, latest, out=times)
    return np.argsort(times, kind="stable")
