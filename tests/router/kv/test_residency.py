"""What placement is told about the workers' caches."""

from __future__ import annotations

import asyncio
import logging
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcserve.engines.kv_events.format import CPU, GPU, STORAGE
from hpcserve.engines.kv_events.messages import KvMessage, Op, pack
from hpcserve.engines.kv_events.units import UNIT, token_bytes, units_of
from hpcserve.router.demand import Demand
from hpcserve.router.kv.learning import Learning
from hpcserve.router.kv.match import Match, levels
from hpcserve.router.kv.residency import IN_FLIGHT, SILENT_SECONDS, SILENT_TOKENS, Residency
from hpcserve.router.kv.translation import Translation
from tests.patience import DEADLINE

CHUNK_TOKENS = 256.0
TOKENS = [(i * 31) % 50_000 for i in range(20 * 256)]
UNITS = units_of(token_bytes(TOKENS), 7)


def demand(chain: tuple[int, ...] = tuple(range(1000, 1020)), *, space: int | None = 7) -> Demand:
    """A prompt of TOKENS, 256 of them in each of its chunks."""
    tokens = len(chain) * 256
    return Demand(prompt_tokens=tokens, output_tokens=16, chain=chain, chunk_tokens=CHUNK_TOKENS, space=space)


def ids(count: int = len(TOKENS)) -> bytes:
    return ", ".join(map(str, TOKENS[:count])).encode()


def news(worker: str, seq: int, *ops: Op, generation: int = 1, source: int = 0) -> KvMessage:
    return KvMessage(worker=worker, generation=generation, source=source, seq=seq, ops=ops)


def live(residency: Residency, worker: str, units: list[int], *, generation: int = 1) -> None:
    ops: tuple[Op, ...] = (("clear", 0, b""), ("store", GPU, pack(units)), ("live", 0, b""))
    residency.apply(news(worker, 0, *ops, generation=generation), now=0.0)


def chunks(residency: Residency, prompt: Demand, now: float = 0.0) -> dict[str, int]:
    return {name: match.chunks for name, match in residency.matches(prompt.chain, now=now).items()}


def test_nothing_is_known_of_a_new_prompt() -> None:
    residency = Residency()
    assert residency.matches((), now=0.0) == {}
    assert residency.matches((1, 2, 3), now=0.0) == {}


def test_siblings_of_a_burst_meet_where_the_first_was_sent() -> None:
    residency = Residency()
    residency.predict("decode-1", demand(), now=0.0)
    sibling = demand((*range(1000, 1010), 5, 6, 7))
    assert chunks(residency, sibling) == {"decode-1": 10}


def test_siblings_meet_before_the_first_event_of_a_worker_with_live_events() -> None:
    residency = Residency()
    live(residency, "decode-1", [])
    residency.learn(demand(), ids())
    residency.predict("decode-1", demand(), now=1.0)
    assert chunks(residency, demand(), now=2.0) == {"decode-1": 20}


def test_what_no_event_confirms_is_not_believed_for_long() -> None:
    residency = Residency()
    live(residency, "decode-1", UNITS[:10])
    residency.learn(demand(), ids())
    residency.predict("decode-1", demand(), now=1.0)
    assert chunks(residency, demand(), now=2.0 + 2 * IN_FLIGHT) == {"decode-1": 5}


def test_predictions_of_a_worker_without_events_last_as_long_as_its_cache_is_large() -> None:
    residency = Residency()
    residency.capacity("decode-1", 25 * CHUNK_TOKENS)
    residency.predict("decode-1", demand(), now=0.0)
    assert chunks(residency, demand(), now=3600.0) == {"decode-1": 20}
    residency.predict("decode-1", demand(tuple(range(10))), now=3600.0)
    # Ten chunks came; of the first prompt, its end has gone.
    assert chunks(residency, demand(), now=3600.0) == {"decode-1": 15}
    assert chunks(residency, demand(tuple(range(10))), now=3600.0) == {"decode-1": 10}


def test_events_tell_of_prompts_that_came_another_way() -> None:
    residency = Residency()
    residency.learn(demand(), ids())
    live(residency, "decode-1", UNITS)
    live(residency, "decode-2", UNITS[:7])
    assert chunks(residency, demand()) == {"decode-1": 20, "decode-2": 3}


def test_evicted_units_are_out_at_once() -> None:
    residency = Residency()
    residency.learn(demand(), ids())
    live(residency, "decode-1", UNITS)
    residency.apply(news("decode-1", 1, ("drop", 0, pack(UNITS[6:]))), now=0.0)
    assert chunks(residency, demand()) == {"decode-1": 3}
    residency.apply(news("decode-1", 2, ("clear", 0, b"")), now=0.0)
    assert chunks(residency, demand()) == {}
    assert residency.live == {"decode-1"}


def test_a_longer_turn_starts_with_what_is_confirmed_of_the_last() -> None:
    residency = Residency()
    residency.learn(demand(), ids())
    live(residency, "decode-1", UNITS)
    longer = demand((*range(1000, 1020), 1, 2, 3))
    assert chunks(residency, longer) == {"decode-1": 20}
    # The new turn was sent there a moment ago: its own chunks have no translation yet.
    residency.predict("decode-1", longer, now=0.0)
    assert chunks(residency, longer) == {"decode-1": 23}


def test_chunks_are_credited_by_the_memory_they_lie_in() -> None:
    residency = Residency()
    residency.learn(demand(), ids())
    live(residency, "decode-1", UNITS[:10])
    residency.apply(
        news("decode-1", 1, ("store", CPU, pack(UNITS[10:30])), ("store", STORAGE, pack(UNITS[30:]))), now=0.0
    )
    assert residency.matches(demand().chain, now=0.0) == {"decode-1": Match(5, 10, 5)}


def test_a_gap_in_the_news_demotes_a_worker_until_all_was_told_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    residency = Residency()
    residency.missing = False
    residency.learn(demand(), ids())
    live(residency, "decode-1", UNITS[:10])
    residency.apply(news("decode-1", 2, ("drop", 0, pack(UNITS[:10]))), now=0.0)
    assert residency.missing
    assert residency.live == set()
    assert chunks(residency, demand()) == {}
    assert "decode-1 is missing" in caplog.text
    live(residency, "decode-1", UNITS)
    assert residency.live == {"decode-1"}
    assert chunks(residency, demand()) == {"decode-1": 20}


def test_a_source_that_gave_up_leaves_prediction_in_its_place() -> None:
    residency = Residency()
    residency.learn(demand(), ids())
    live(residency, "decode-1", UNITS)
    residency.predict("decode-1", demand(tuple(range(5))), now=0.0)
    residency.apply(news("decode-1", 1, ("silent", 0, b"")), now=0.0)
    assert residency.live == set()
    assert chunks(residency, demand()) == {}
    assert chunks(residency, demand(tuple(range(5))), now=100.0) == {"decode-1": 5}


def test_an_engine_that_computes_and_announces_nothing_is_demoted_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    residency = Residency()
    live(residency, "decode-1", UNITS)
    with caplog.at_level(logging.WARNING):
        residency.computed("decode-1", 100.0, now=0.0)
        residency.computed("decode-1", 100.0 + SILENT_TOKENS, now=SILENT_SECONDS / 2)
        assert residency.live == {"decode-1"}
        residency.computed("decode-1", 100.0 + SILENT_TOKENS, now=SILENT_SECONDS)
        assert residency.live == set()
        residency.computed("decode-1", 200.0 + SILENT_TOKENS, now=2 * SILENT_SECONDS)
    assert len(caplog.records) == 1
    assert "decode-1 announces no KV blocks" in caplog.text
    residency.apply(news("decode-1", 1, ("store", GPU, pack([1, 2]))), now=30.0)
    assert residency.live == {"decode-1"}


def test_a_restarted_engine_has_an_empty_cache() -> None:
    residency = Residency()
    residency.learn(demand(), ids())
    live(residency, "decode-1", UNITS)
    residency.predict("decode-1", demand(tuple(range(5))), now=0.0)
    live(residency, "decode-1", UNITS[:4], generation=2)
    assert chunks(residency, demand()) == {"decode-1": 2}
    assert chunks(residency, demand(tuple(range(5)))) == {}
    # Late news of the dead one.
    residency.apply(news("decode-1", 1, ("store", GPU, pack(UNITS))), now=0.0)
    assert chunks(residency, demand()) == {"decode-1": 2}


def test_workers_that_left_the_table_are_forgotten() -> None:
    residency = Residency()
    for worker in ("decode-1", "decode-2"):
        residency.predict(worker, demand(), now=0.0)
    residency.keep_only({"decode-2": 1})
    assert chunks(residency, demand()) == {"decode-2": 20}


def test_a_table_with_a_newer_generation_empties_the_old_ones_cache() -> None:
    residency = Residency()
    residency.learn(demand(), ids())
    live(residency, "decode-1", UNITS)
    residency.keep_only({"decode-1": 1})
    assert chunks(residency, demand()) == {"decode-1": 20}
    residency.keep_only({"decode-1": 2})
    assert chunks(residency, demand()) == {}


def test_a_replica_over_two_nodes_is_one_worker() -> None:
    residency = Residency()
    residency.learn(demand(), ids())
    live(residency, "decode-1", UNITS[:10])
    ops: tuple[Op, ...] = (("clear", 0, b""), ("store", 0, pack(UNITS[:20])), ("live", 0, b""))
    residency.apply(news("decode-1", 0, *ops, source=1), now=0.0)
    assert chunks(residency, demand()) == {"decode-1": 10}


def test_relays_share_where_prompts_went_and_what_they_learned() -> None:
    one, other = Residency(share=True), Residency(share=True)
    for residency in (one, other):
        live(residency, "decode-1", UNITS[:10])
        residency.capacity("decode-2", 1e6)
    assert one.outgoing() is None
    one.learn(demand(), ids())
    one.predict("decode-2", demand((1, 2, 3)), now=0.0)
    message = one.outgoing()
    assert message is not None
    assert one.outgoing() is None
    other.apply(message, now=0.0)
    assert chunks(other, demand()) == {"decode-1": 5}
    assert chunks(other, demand((1, 2, 3))) == {"decode-2": 3}
    assert other.outgoing() is None  # what was heard is not told again


def test_memory_is_bounded_and_the_oldest_go() -> None:
    random.seed(3)
    residency = Residency(most_units=4096 * 8, most_predicted=1000, most_translations=4096 * 8)
    live(residency, "decode-1", [])
    old = [random.getrandbits(64) for _ in range(1000)]
    residency.apply(news("decode-1", 1, ("store", 0, pack(old))), now=0.0)
    for seq in range(2, 52):
        fresh = [random.getrandbits(64) for _ in range(2000)]
        residency.apply(news("decode-1", seq, ("store", 0, pack(fresh))), now=0.0)
    stats = residency.stats()
    assert stats["units"] <= 4096 * 8
    assert stats["units"] + stats["units_evicted"] == 101_000
    for number in range(100):
        prompt = demand(tuple(range(number * 100, number * 100 + 20)))
        residency.predict(f"decode-{number % 4}", prompt, now=0.0)
    assert residency.stats()["predicted"] <= 1000 + 20
    assert chunks(residency, demand(tuple(range(9900, 9920)))) == {"decode-3": 20}
    assert chunks(residency, demand(tuple(range(20)))) == {}


def test_a_number_is_used_again_only_when_nothing_names_it_any_more() -> None:
    residency = Residency()
    residency.learn(demand(), ids())
    for generation in range(1, 200):
        live(residency, "decode-1", UNITS if generation % 2 else UNITS[:2], generation=generation)
    assert chunks(residency, demand()) == {"decode-1": 20}
    live(residency, "decode-1", UNITS[:2], generation=200)
    assert chunks(residency, demand()) == {"decode-1": 1}


def test_512_workers_that_share_a_system_prompt() -> None:
    residency = Residency()
    residency.learn(demand(), ids())
    for number in range(512):
        live(residency, f"decode-{number}", UNITS[: 4 + 2 * (number % 3)])
    found = chunks(residency, demand())
    assert len(found) == 512
    assert all(found[f"decode-{number}"] == 2 + number % 3 for number in range(512))


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 30))
def test_levels_tell_how_far_each_bit_reaches(reaches: list[int], length: int) -> None:
    def holding(at: int) -> int:
        return sum(1 << bit for bit, reach in enumerate(reaches) if reach > at)

    found = {bit: count for count, mask in levels(holding, length) for bit in range(12) if mask >> bit & 1}
    assert found == {bit: min(reach, length) for bit, reach in enumerate(reaches) if reach}


def test_a_prompt_is_translated_at_the_share_of_its_bytes() -> None:
    residency = Residency()
    # Estimated at 256 tokens a chunk; in fact 128.
    residency.learn(demand(), ids(20 * UNIT))
    live(residency, "decode-1", UNITS[:9])
    assert chunks(residency, demand()) == {"decode-1": 9}


def test_a_prompt_with_images_is_never_translated() -> None:
    residency = Residency()
    residency.learn(demand(space=None), ids())
    assert residency.stats()["translations"] == 0


@pytest.mark.parametrize("raw", [b"1,", b"{}", b'"a"', b"1.5", b"-1", b"99999999999999999999999"])
def test_what_is_no_list_of_token_ids_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="prompt_token_ids"):
        Residency().learn(demand(), raw)


def test_messages_are_read_from_the_control_line() -> None:
    residency = Residency()
    residency.learn(demand(), ids())
    ops: tuple[Op, ...] = (("clear", 0, b""), ("store", 0, pack(UNITS)), ("live", 0, b""))
    residency.hear(msgspec.json.encode(news("decode-1", 0, *ops)), now=0.0)
    assert chunks(residency, demand()) == {"decode-1": 20}
    with pytest.raises(ValueError):
        residency.hear(b'{"type":"kv"}', now=0.0)
    with pytest.raises(ValueError):
        residency.apply(news("decode-1", 1, ("store", 0, b"123")), now=0.0)


async def test_prompts_are_learned_after_the_fact_and_in_turn(caplog: pytest.LogCaptureFixture) -> None:
    residency = Residency()
    residency.apply(news("decode-1", 0, ("clear", 0, b"")), now=0.0)
    learning = Learning(residency)
    learning.put(demand((1, 2, 3)), b"no ids")
    learning.put(demand(), ids())
    assert residency.stats()["translations"] == 0
    async with asyncio.timeout(DEADLINE):
        while residency.stats()["translations"] < 20:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert "prompt_token_ids" in caplog.text
    learning.put(demand((4, 5)), ids())
    learning.close()


async def test_nothing_waits_to_be_learned_where_no_engine_tells_what_it_holds() -> None:
    learning = Learning(Residency())
    learning.put(demand(), ids())
    assert not learning._waiting


async def test_prompts_that_wait_are_bounded_in_bytes() -> None:
    residency = Residency()
    residency.apply(news("decode-1", 0, ("clear", 0, b"")), now=0.0)
    learning = Learning(residency)
    for number in range(20):
        learning.put(demand((number, 2, 3)), b"1," * (1 << 19))
    assert [one[0].chain[0] for one in learning._waiting] == [*range(12, 20)]
    learning.put(demand(), b"1," * (1 << 23))
    assert not learning._waiting
    learning.close()


def test_only_what_prompts_have_in_common_is_learned() -> None:
    residency = Residency()
    first, second = demand(), demand((*range(1000, 1012), *range(8)))
    residency.predict("decode-1", first, now=0.0)
    residency.learn(first, ids())
    assert residency.stats()["translations"] == 0
    for worker in ("prefill-1", "decode-1"):
        residency.predict(worker, second, now=0.0)
    residency.learn(second, ids())
    assert residency.stats()["translations"] == 12


@given(st.integers(1, 19), st.integers(0, 4000), st.sampled_from([",", ", "]))
def test_a_prompt_learned_in_two_turns_is_where_it_is_learned_at_once(
    turn: int, more: int, comma: str
) -> None:
    tokens = [10_000 + token for token in TOKENS + TOKENS[:more]]
    raw = comma.join(map(str, tokens)).encode()
    whole = Demand(
        prompt_tokens=len(tokens), output_tokens=1, chain=tuple(range(20)), chunk_tokens=256.0, space=7
    )
    units = units_of(token_bytes(tokens), 7)
    once, twice = Translation(most=100_000), Translation(most=100_000)
    once.learn(whole, raw, 20)
    assert len(twice.learn(whole, raw, turn)) == turn
    assert len(twice.learn(whole, raw, 20)) == 20 - turn
    for chunk in range(20):
        for found in (once.get(chunk), twice.get(chunk)):
            assert found is not None
            assert abs(units.index(found) - (2 * chunk + 1)) <= 1
