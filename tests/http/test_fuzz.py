"""A short run of the fuzzer; `python -m tests.http.fuzz` is the long one."""

from __future__ import annotations

import pytest

from .fuzz import run


@pytest.mark.parametrize("kind, count, seed", [("requests", 3000, 20261), ("responses", 2000, 20262)])
async def test_fuzz(kind, count, seed):
    result = await run(kind, count, seed)
    assert result.failures == []
    assert result.cases == count
    # Mutations that are all refused would show nothing.
    assert result.served > count / 4 and result.refused > count / 4


async def test_equal_seeds_give_equal_cases():
    from .fuzz_requests import seeds
    from .mutations import Mutator

    first, second = ([Mutator(seeds(), f"1/{n}").message() for n in range(100)] for _ in range(2))
    assert first == second and len(set(first)) > 50
