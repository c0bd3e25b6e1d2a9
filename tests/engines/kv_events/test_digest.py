"""Engines' block events become units that don't depend on how the engine cuts and announces blocks."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hpcserve.engines.kv_events import units
from hpcserve.engines.kv_events.digest import Digest
from hpcserve.engines.kv_events.format import CPU, GPU, STORAGE, BlockStored

from .caches import Cache

BLOCK_SIZES = st.sampled_from([1, 7, 16, 48, 64, 100, 128, 192, 256, 544])


def prompt_units(tokens: list[int], lora: str | None = None, salt: str | None = None) -> list[int]:
    return units.units_of(units.token_bytes(tokens), units.space(lora, salt))


class Follower:
    """Applies changes as a router does."""

    def __init__(self) -> None:
        self.tier_of: dict[int, int] = {}

    def follow(self, digest: Digest) -> dict[int, int]:
        changes = digest.changes()
        if changes.cleared:
            self.tier_of.clear()
        for unit in changes.dropped:
            del self.tier_of[unit]
        for tier, stored in changes.stored.items():
            self.tier_of.update(dict.fromkeys(stored, tier))
        return self.tier_of


def tokens_of(seed: int, length: int) -> list[int]:
    return [(seed * 7919 + i * 31) % 150_000 for i in range(length)]


@settings(max_examples=50)
@given(size=BLOCK_SIZES, length=st.integers(0, 1500), splits=st.lists(st.integers(0, 200)))
def test_any_cut_into_blocks_and_events_gives_the_same_units(
    size: int, length: int, splits: list[int]
) -> None:
    tokens = tokens_of(1, length)
    cache, digest = Cache(size), Digest()
    digest.apply(cache.store(tokens, splits=splits))
    whole_blocks = length // size * size
    assert list(Follower().follow(digest)) == prompt_units(tokens[:whole_blocks])


@settings(max_examples=40)
@given(data=st.data(), size=st.sampled_from([16, 48, 100, 128, 192]))
def test_published_units_are_what_a_prompt_can_reuse_whatever_comes_and_goes(
    data: st.DataObject, size: int
) -> None:
    """Prompts that share prefixes are stored and their blocks removed in any order, in any tier."""
    cache, digest, follower = Cache(size), Digest(), Follower()
    prompts = [
        tokens_of(1, shared) + tokens_of(own, 700 - shared)
        for own, shared in enumerate((0, 130, 300, 300, 650), start=2)
    ]
    for _ in range(data.draw(st.integers(1, 12))):
        prompt = data.draw(st.sampled_from(prompts))
        known = [prefix for prompt in prompts for prefix in cache.blocks(prompt)]
        match data.draw(st.sampled_from(["store", "store", "remove", "clear"])):
            case "store":
                tier = data.draw(st.sampled_from([GPU, CPU]))
                digest.apply(cache.store(prompt, splits=data.draw(st.lists(st.integers(0, 9))), tier=tier))
            case "remove" if known:
                tier = data.draw(st.sampled_from([None, GPU, CPU]))
                digest.apply([cache.remove(data.draw(st.sampled_from(known)), tier=tier)])
            case "clear" if data.draw(st.booleans()):
                digest.apply([cache.clear()])
        if data.draw(st.booleans()):
            follower.follow(digest)
    held = follower.follow(digest)
    expected = {unit for prompt in prompts for unit in prompt_units(prompt[: cache.reusable(prompt)])}
    assert held.keys() == expected
    anew = {unit for stored in digest.snapshot().stored.values() for unit in stored}
    assert anew == expected


def test_removing_a_block_takes_its_unit_away_and_hides_what_is_behind_it() -> None:
    tokens = tokens_of(3, 1024)
    cache, digest, follower = Cache(16), Digest(), Follower()
    digest.apply(cache.store(tokens))
    everything = prompt_units(tokens)
    assert set(follower.follow(digest)) == set(everything)
    digest.apply([cache.remove(tokens[:272])])
    assert set(follower.follow(digest)) == set(everything[:2])
    digest.apply(cache.store(tokens[:272]))
    assert set(follower.follow(digest)) == set(everything)


def test_the_same_blocks_announced_twice_count_once() -> None:
    tokens = tokens_of(3, 512)
    cache, digest, follower = Cache(64), Digest(), Follower()
    digest.apply(cache.store(tokens))
    digest.apply(cache.store(tokens))
    assert len(follower.follow(digest)) == 4
    digest.apply([cache.remove(prefix) for prefix in reversed(cache.blocks(tokens))])
    assert not follower.follow(digest)
    assert len(digest) == 0


def test_blocks_behind_one_that_was_never_announced_are_counted_not_published() -> None:
    tokens = tokens_of(3, 512)
    cache, digest = Cache(64), Digest()
    digest.apply(cache.store(tokens, splits=[4])[1:])
    assert not digest.changes()
    assert digest.unknown == 1


def test_a_unit_is_in_the_slowest_tier_that_its_prefix_needs() -> None:
    tokens = tokens_of(3, 512)
    cache, digest, follower = Cache(128), Digest(), Follower()
    digest.apply(cache.store(tokens))
    # Moved to the host as the offloading connector says it: no tokens, no parent.
    names = [cache.name(prefix) for prefix in cache.blocks(tokens)]
    digest.apply([BlockStored(hashes=names[1:], parent=None, tokens=[], block_size=128, tier=CPU)])
    digest.apply([BlockStored(hashes=names[3:], parent=None, tokens=[], block_size=128, tier=STORAGE)])
    assert list(follower.follow(digest).values()) == [GPU] * 4
    digest.apply([cache.remove(prefix, tier=GPU) for prefix in reversed(cache.blocks(tokens)[1:])])
    held = follower.follow(digest)
    assert [held[unit] for unit in prompt_units(tokens)] == [GPU, CPU, CPU, CPU]


def test_loras_and_cache_salts_are_kept_apart() -> None:
    tokens = tokens_of(5, 256)
    digest, follower = Digest(), Follower()

    def stored(name: int, lora: str | None, extra: list[list[object] | None]) -> BlockStored:
        return BlockStored(
            hashes=[name, name + 1],
            parent=None,
            tokens=tokens,
            block_size=128,
            tier=GPU,
            lora=lora,
            extra=extra,
        )

    digest.apply([stored(1, None, [None, None])])
    digest.apply([stored(3, "adapter", [["adapter"], ["adapter"]])])
    digest.apply([stored(5, None, [["salt"], None])])
    digest.apply([stored(7, "adapter", [["adapter", "salt"], ["adapter"]])])
    digest.apply([stored(9, None, [None, [["image-hash", 3]]])])
    held = set(follower.follow(digest))
    plain = prompt_units(tokens)
    for lora, salt in ((None, None), ("adapter", None), (None, "salt"), ("adapter", "salt")):
        assert held >= set(prompt_units(tokens, lora, salt))
    assert len(held) == 9  # the image's prompt shares its first unit with the plain one
    assert plain[0] in held


def test_ranks_of_one_engine_are_one_cache_until_one_of_them_starts_anew() -> None:
    tokens = tokens_of(5, 256)
    cache, digest, follower = Cache(16), Digest(), Follower()
    digest.apply(cache.store(tokens), rank=0)
    digest.apply(cache.store(tokens[:128]), rank=1)
    assert len(follower.follow(digest)) == 2
    digest.clear(rank=0)
    assert list(follower.follow(digest)) == prompt_units(tokens[:128])
    digest.clear(rank=1)
    assert not follower.follow(digest)


def test_a_cache_larger_than_the_bound_loses_its_oldest_ends() -> None:
    cache, digest, follower = Cache(128), Digest(most=100), Follower()
    prompts = [tokens_of(seed, 512) for seed in range(60)]
    for prompt in prompts:
        digest.apply(cache.store(prompt))
    assert len(digest) <= 104
    held = follower.follow(digest)
    assert set(prompt_units(prompts[-1])) <= held.keys()
    assert not set(prompt_units(prompts[0])) <= held.keys()
