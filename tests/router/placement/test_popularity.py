"""How often prompts come back."""

from __future__ import annotations

from hpcserve.router.placement.popularity import _MOST, Popularity


def test_uses_are_forgotten_and_the_memory_is_bounded():
    popularity = Popularity()
    for _ in range(5):
        popularity.used(1, 10.0)
    assert popularity.of(1, 10.0) == 5.0
    assert popularity.of(1, 500.0) < 0.01
    for chunk in range(2, _MOST + 10):
        popularity.used(chunk, 10.0)
    assert popularity.of(1, 10.0) == 0.0
    assert popularity.of(_MOST, 10.0) == 1.0
