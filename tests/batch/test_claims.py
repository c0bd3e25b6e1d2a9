"""Claims: every item is somebody's, and none is lost with whoever claimed it."""

from __future__ import annotations

import random
from itertools import chain

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcserve.batch.claims import LONGEST, SHORTEST, Claims

ORDER = np.random.default_rng(1).permutation(10_000).astype("<u8")


def test_one_member_gets_all_in_order(tmp_path):
    claims = Claims(tmp_path, ORDER, "a", lambda name: True)
    assert not claims.begun()
    taken = []
    while (items := claims.take(1)) is not None:
        taken.append(items)
    assert claims.begun()
    assert np.concatenate(taken).tolist() == ORDER.tolist()
    sizes = [len(items) for items in taken]
    assert max(sizes) <= LONGEST and min(sizes[:-1]) >= SHORTEST
    assert sizes == sorted(sizes, reverse=True)


def test_members_share_without_overlap_and_join_and_leave_at_any_time(tmp_path):
    members = {name: Claims(tmp_path, ORDER, name, lambda name: True) for name in "abc"}
    random_ = random.Random(2)
    taken: dict[str, list[int]] = {name: [] for name in "abcd"}
    while True:
        if sum(map(len, taken.values())) > 5000 and "d" not in members:
            members["d"] = Claims(tmp_path, ORDER, "d", lambda name: True)
        name = random_.choice(sorted(members))
        items = members[name].take(len(members))
        if items is None:
            break
        taken[name] += items.tolist()
    assert sorted(chain.from_iterable(taken.values())) == sorted(ORDER.tolist())
    assert all(taken.values())


def test_what_a_dead_member_had_is_the_next_rounds_work_and_a_living_ones_is_not(tmp_path):
    alive = {"dead", "living", "me"}
    claims = {name: Claims(tmp_path, ORDER, name, alive.__contains__) for name in sorted(alive)}
    done = np.zeros(len(ORDER), bool)
    lost = claims["dead"].take(3)
    held = claims["living"].take(3)
    done[lost[:100]] = True
    while (items := claims["me"].take(3)) is not None:
        done[items] = True
    assert not claims["me"].renew(done)
    alive.remove("dead")
    assert claims["me"].renew(done)
    again = []
    while (items := claims["me"].take(2)) is not None:
        again += items.tolist()
    assert again == lost[100:].tolist()
    done[again] = True
    done[held] = True
    assert not claims["me"].renew(done)


def test_two_that_renew_at_once_make_one_round(tmp_path):
    done = np.zeros(len(ORDER), bool)
    one = Claims(tmp_path, ORDER, "one", lambda name: False)
    two = Claims(tmp_path, ORDER, "two", lambda name: False)
    for claims in (one, two):
        while (items := claims.take(2)) is not None:
            done[items[5:]] = True
    assert one.renew(done)
    assert two.renew(done)
    assert one.round == 1
    found = []
    for claims in (one, two, one, two):
        while (items := claims.take(2)) is not None:
            found += items.tolist()
    assert sorted(set(found)) == sorted(np.flatnonzero(~done).tolist())


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 600))
def test_with_members_that_die_at_any_moment_all_is_done_in_the_end(tmp_path_factory, seed, count, size):
    directory = tmp_path_factory.mktemp("claims")
    random_ = random.Random(seed)
    order = np.random.default_rng(seed).permutation(size).astype("<u8")
    done = np.zeros(size, bool)
    alive: set[str] = set()
    holding: dict[str, list[int]] = {}
    claims: dict[str, Claims] = {}
    born = 0
    for _ in range(20_000):
        if done.all():
            break
        while len(alive) < count:
            name = f"m{born}"
            born += 1
            alive.add(name)
            holding[name] = []
            claims[name] = Claims(directory, order, name, alive.__contains__)
        name = random_.choice(sorted(alive))
        if random_.random() < 0.05:
            alive.remove(name)
        elif holding[name]:
            done[holding[name].pop()] = True
        else:
            items = claims[name].take(len(alive))
            if items is not None:
                holding[name] = items.tolist()
            else:
                claims[name].renew(done)
    assert done.all()
