"""What figures mean: who is slow, who is cut, and what ends the job."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from hpcserve.node.preflight.records import Broken, Pair
from hpcserve.node.preflight.report import document, event, table, unused_devices
from hpcserve.node.preflight.verdict import Verdict, judge, suspects

from .samples import outcome, pair, probe

P = [probe(rank, "prefill") for rank in (1, 2)]
D = [probe(rank, "decode") for rank in (3, 4)]
LINK = 50.0


def judged(*pairs: Pair) -> Verdict:
    return judge(outcome(*pairs))


def grid(
    rates: dict[tuple[int, int], float | None], *, link: float | None, usual: float | None = 40.0
) -> list[Pair]:
    """All pairs of P and D; `rates` by rank of those that are not usual."""
    return [
        pair(one, other, rates.get((one.rank, other.rank), usual), link=link) for one, other in product(P, D)
    ]


def messages(verdict: Verdict) -> list[str]:
    return [finding.message for finding in verdict.findings]


def test_nothing_is_said_of_links_that_carry_half_their_rate() -> None:
    assert judged(*grid({(1, 3): 25.0}, link=LINK)) == Verdict()


def test_a_node_that_is_slow_with_everybody_is_named_with_its_hca_and_the_links_rate() -> None:
    verdict = judged(*grid({(1, 4): 3.0, (2, 4): 2.5}, link=LINK))
    [message] = messages(verdict)
    assert message.startswith("n4 moves KV slowly with all 2 partners over mlx5_0:1: 3 GB/s at best")
    assert "6% of the link's 50 GB/s" in message
    assert "others have 40 GB/s" in message
    assert "ibstat" in verdict.findings[0].hint and "--exclude=n4" in verdict.findings[0].hint
    assert not verdict.findings[0].failed and verdict.fatal is None


def test_a_pair_that_is_slow_while_both_are_fine_with_others_is_named_as_a_pair() -> None:
    [message] = messages(judged(*grid({(2, 3): 4.0}, link=LINK)))
    assert message.startswith("KV moves slowly between n2 and n3")
    assert "8% of the link's 50 GB/s" in message


def test_a_direction_is_enough_to_be_slow() -> None:
    pairs = grid({}, link=LINK)
    pairs[0] = pair(P[0], D[0], 40.0, link=LINK, back=1.0)
    [message] = messages(judged(*pairs))
    assert "1 GB/s from n3 (read by n1)" in message


def test_without_a_rate_a_node_is_compared_with_the_median_of_the_others() -> None:
    assert messages(judged(*grid({}, link=None))) == []
    [message] = messages(judged(*grid({(1, 4): 3.0, (2, 4): 3.0}, link=None)))
    assert message.startswith("n4 moves KV slowly with all 2 partners")
    assert "of the link" not in message and "others have 40 GB/s" in message


def test_of_two_decode_nodes_the_slower_one_is_named_and_not_the_prefill_node() -> None:
    verdict = judged(pair(P[0], D[0], 40.0), pair(P[0], D[1], 3.0))
    [message] = messages(verdict)
    assert message.startswith("n4 moves KV slowly with n1 over mlx5_0:1: 3 GB/s,")


def test_a_single_pair_of_unknown_rate_is_not_judged() -> None:
    assert judged(pair(P[0], D[0], 0.001)) == Verdict()


def test_a_link_rate_that_nobody_reaches_is_one_warning() -> None:
    [message] = messages(judged(*grid({}, link=LINK, usual=5.0)))
    assert message.startswith("KV moves at less than half of the link's rate in all 4 pairs")


def test_where_nobody_reaches_the_rate_the_slow_node_is_still_named() -> None:
    found = messages(judged(*grid({(1, 4): 0.1, (2, 4): 0.1}, link=LINK, usual=5.0)))
    assert len(found) == 2
    assert found[1].startswith("n4 moves KV slowly")


def test_of_a_node_with_two_hcas_the_slow_one_is_named() -> None:
    wide = [probe(3, "decode", number=place, device=f"mlx5_{place}:1") for place in (0, 1)]
    pairs = [pair(one, wide[0], 40.0, link=LINK) for one in P]
    pairs += [pair(one, wide[1], 4.0, link=LINK) for one in P]
    [message] = messages(judged(*pairs))
    assert "over mlx5_1:1:" in message and "mlx5_0:1" not in message


def test_a_cut_node_is_named_and_the_job_goes_on() -> None:
    verdict = judged(*grid({(1, 4): None, (2, 4): None}, link=LINK))
    assert verdict.fatal is None
    [finding] = verdict.findings
    assert finding.failed
    assert finding.message == "n4 can't move KV to any of 2 partners over mlx5_0:1: nothing came"


def test_a_cut_pair_is_named_as_a_pair() -> None:
    verdict = judged(*grid({(1, 4): None}, link=LINK))
    assert verdict.fatal is None
    [message] = messages(verdict)
    assert message.startswith("KV can't move between n1 and n4 over mlx5_0:1, and does with others")


def test_when_no_pair_passes_the_job_has_nothing_to_serve() -> None:
    verdict = judged(*grid({}, link=LINK, usual=None))
    assert verdict.fatal is not None
    assert verdict.fatal.message.startswith(
        "no prefill node reaches any decode node by NIXL: all 4 pairs failed; n1 → n3 over mlx5_0:1"
    )


def test_a_node_that_could_not_be_measured_may_be_the_one_that_works() -> None:
    late = Broken(cause="silent", message="n2 did not come to the preflight within 60 s")
    verdict = judge(outcome(pair(P[0], D[0], None), n2=late))
    assert verdict.fatal is None
    told = verdict.findings[-1]
    assert told.failed and told.message == "KV can't move between n1 and n3 over mlx5_0:1: nothing came"
    assert "so this may be all pairs" in told.hint
    # Of one without the device it is known that it does not.
    without = Broken(cause="backend", message="NIXL could not start UCX on mlx5_9:1: NIXL_ERR_BACKEND")
    found = judge(replace(outcome(pair(P[0], D[0], None), n2=without), unmeasured=1)).fatal
    assert found is not None
    assert "the only pair failed of those that could be tried (1 could not)" in found.message


def test_a_missing_nixl_is_one_warning_for_all_nodes_and_ends_nothing() -> None:
    broken = Broken(cause="import", message="NIXL can't be imported: no", hint="install `nixl`")
    verdict = judge(outcome(n1=broken, n3=broken))
    [finding] = verdict.findings
    assert verdict.fatal is None
    assert finding.message == "no KV preflight of n1, n3: NIXL can't be imported: no"
    assert finding.hint.startswith("install `nixl`; `kv_preflight: false`")


def test_devices_that_no_node_has_end_the_job() -> None:
    broken = Broken(cause="backend", message="NIXL could not start UCX on mlx5_9:1: NIXL_ERR_BACKEND")
    verdict = judge(outcome(n1=broken, n3=broken))
    assert verdict.fatal is not None and "mlx5_9:1" in verdict.fatal.message
    some = judge(outcome(pair(P[0], D[0], 40.0), n4=broken))
    assert some.fatal is None and len(some.findings) == 1
    missing = Broken(cause="import", message="NIXL can't be imported: no")
    assert judge(outcome(n1=broken, n3=missing)).fatal is None


def test_a_dead_process_is_named_beside_the_figures_of_the_others() -> None:
    broken = Broken(cause="died", message="the preflight's process on n4 ended by SIGSEGV")
    verdict = judge(outcome(pair(P[0], D[0], 40.0, link=LINK), n4=broken))
    assert messages(verdict) == ["no KV preflight of n4: the preflight's process on n4 ended by SIGSEGV"]
    assert verdict.fatal is None


def nvlinked(gbs: float | None, place: int = 0) -> Pair:
    one, other = (replace(probe, nvlink=True) for probe in (P[place], D[place]))
    return pair(one, other, gbs, link=LINK)


def test_what_the_network_carries_says_nothing_of_kv_over_nvlink() -> None:
    found = replace(outcome(nvlinked(None), nvlinked(0.1, 1)), nvlink=True)
    assert judge(found) == Verdict()
    mixed = (nvlinked(40.0), nvlinked(0.1, 1))
    assert suspects(tuple(replace(pair, prefill=replace(pair.prefill, nvlink=False)) for pair in mixed))
    assert suspects(mixed) == ()
    told = event(found)
    assert (told["pairs"], told["failed"], told["over_nvlink"], told["slowest"]) == (0, 0, 2, None)
    lines = table(found).splitlines()
    assert "NVLink was not measured" in lines[1]
    assert all(line.endswith("(KV: NVLink)") for line in lines[3:]) and len(lines) == 5


def test_where_nvlink_may_work_nothing_ends_the_job() -> None:
    broken = Broken(cause="backend", message="NIXL could not start UCX on mlx5_9:1: NIXL_ERR_BACKEND")
    assert judge(outcome(n1=broken, n3=broken)).fatal is not None
    assert judge(replace(outcome(n1=broken, n3=broken), nvlink=True)).fatal is None
    # One of two racks: its pairs are cut, and those of the other use NVLink.
    cut = pair(P[0], D[0], None, link=LINK)
    assert judge(replace(outcome(cut, nvlinked(0.1, 1)), nvlink=True)).fatal is None


def test_between_racks_kv_goes_over_the_network_and_is_judged() -> None:
    """One end has partners in its own domain only, the other has not, so UCX does not use NVLink."""
    slow = pair(replace(P[0], nvlink=True), D[0], 3.0, link=LINK)
    [message] = messages(judged(slow, *grid({}, link=LINK)[1:]))
    assert message.startswith("KV moves slowly between n1 and n3")


def test_devices_that_nothing_was_measured_over_are_told() -> None:
    rails = ("mlx5_0:1", "mlx5_1:1", "mlx5_2:1")
    one, other = (replace(probe, devices=rails) for probe in (P[0], D[0]))
    second = replace(one, name="1.1", gpu=1, rail=("mlx5_1:1",))
    used = pair(one, other, 40.0)
    used = replace(used, figures=tuple(replace(figure, devices=rails[:1]) for figure in used.figures))
    found = outcome(used, pair(second, replace(other, rail=("mlx5_1:1",)), None))
    assert unused_devices(found) == {"n1": ("mlx5_2:1",), "n3": ("mlx5_2:1",)}
    assert "Not measured on n1, n3, though engines may use it: mlx5_2:1" in table(found).splitlines()
    assert document(found, judge(found), "a.0")["unused_devices"] == {
        "n1": ("mlx5_2:1",),
        "n3": ("mlx5_2:1",),
    }
    [failed] = [row for row in table(found).splitlines() if "failed" in row]
    assert failed.startswith("n1 GPU 1")
    silent = tuple(replace(figure, transport=None) for figure in used.figures)
    assert unused_devices(outcome(replace(used, figures=silent))) == {}, "UCX did not say"


def test_many_findings_are_cut_to_a_few() -> None:
    prefill = [probe(rank, "prefill") for rank in range(20)]
    decode = [probe(100 + rank, "decode") for rank in range(20)]
    pairs = [
        pair(one, other, None if (one.rank + other.rank) % 20 == 0 else 40.0, link=LINK)
        for one, other in product(prefill, decode)
    ]
    found = messages(judged(*pairs))
    assert len(found) == 9
    assert found[-1] == "12 more nodes or pairs that move no KV"


def test_the_table_and_the_event_have_the_slowest_pair() -> None:
    pairs = grid({(1, 4): 3.0, (2, 3): None}, link=LINK)
    told = event(outcome(*pairs))
    assert (told["pairs"], told["failed"]) == (4, 1)
    assert (told["slowest"]["prefill"], told["slowest"]["decode"]) == ("n1", "n4")
    assert told["slowest"]["ratio"] == 0.06
    lines = table(outcome(*pairs)).splitlines()
    assert lines[0].startswith("KV preflight: 4 pairs measured")
    assert lines[2].split()[:3] == ["n2", "n3", "failed"]
    assert lines[3].split()[:4] == ["n1", "n4", "3", "GB/s"]
    assert "rc_mlx5/mlx5_0:1" in lines[3] and "6%" in lines[3]
