"""The ladder as stories: what a person sees between sbatch and READY."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcserve.cli.ladder import Progress, Replica, Rung, duration, fold, rungs, size, with_joined
from hpcserve.slurm.scheduler import JobState

T0 = 1_790_000_000.0


def launched(*names: str, ranks: int = 4) -> Progress:
    return Progress(
        submitted=T0,
        ranks=ranks,
        replicas={name: Replica() for name in names or ("prefill-0", "decode-0")},
        disaggregated=True,
    )


def job(state: str, **fields: Any) -> JobState:
    return JobState(job_id="42", state=state, **fields)


def at(after: float, event: str, **fields: Any) -> dict[str, Any]:
    return {"t": T0 + after, "event": event, **fields}


def seen(progress: Progress, after: float = 100) -> dict[str, Rung]:
    return {rung.name: rung for rung in rungs(progress, T0 + after)}


def current(progress: Progress, after: float = 100) -> Rung:
    return next(rung for rung in rungs(progress, T0 + after) if rung.state in ("now", "failed"))


WAY_TO_READY: tuple[Mapping[str, Any], ...] = (
    at(60, "job-started", node="n1"),
    *(at(61 + rank, "rank-joined", rank=rank, node=f"n{rank + 1}") for rank in range(4)),
    at(65, "rendezvous", transport="mpi", ranks=4, seconds=1.5),
    at(66, "engine-starting", replica="prefill-0", node="n1"),
    at(66, "engine-starting", replica="decode-0", node="n2"),
    at(80, "engine-ready", replica="prefill-0", url="http://a", seconds=14.0),
    at(90, "engine-ready", replica="decode-0", url="http://b", seconds=24.0),
    at(91, "kv-path", prefill="prefill-0", decode="decode-0", bytes=524288, seconds=0.014, ok=True),
    at(92, "first-token", seconds=0.21),
    at(92.5, "ready", seconds=32.5, url="http://n1:20000/v1"),
)


def test_a_model_that_is_staged_has_a_rung_of_its_own() -> None:
    gib = 1 << 30
    progress = fold(replace(launched(), stages=True), WAY_TO_READY[:6])
    assert current(progress).name == "model staged"
    progress = fold(progress, [at(70, "staging", bytes=132 * gib, total=640 * gib, rate=8.1 * gib)])
    assert current(progress).text == "staging 132.0 GiB of 640.0 GiB, 8.1 GiB/s"
    done = fold(
        progress, [at(140, "staged", path="/nvme/x", bytes=640 * gib, seconds=80.0, nodes=4, reused=1)]
    )
    assert seen(done)["model staged"].text == "640.0 GiB on 4 nodes, 1 of them had it, 1:20"
    assert current(done).name == "engines loading"
    shared = fold(progress, [at(140, "staged", path=None)])
    assert seen(shared)["model staged"].text == "no: engines load from the shared path"
    assert "model staged" not in seen(fold(launched(), WAY_TO_READY))


def test_before_the_scheduler_has_answered_it_says_so() -> None:
    assert current(launched()).text == "asking the scheduler"


def test_a_waiting_job_shows_why_in_plain_words_and_when_it_may_start() -> None:
    waiting = replace(launched(), job=job("PENDING", reason="Priority", start=T0 + 100 + 720))
    assert current(waiting) == Rung(
        name="queued",
        state="now",
        text="waiting in the queue: jobs with a higher priority come first; expected to start in 12:00",
    )


def test_an_estimate_that_has_passed_is_not_shown() -> None:
    waiting = replace(launched(), job=job("PENDING", reason="Resources", start=T0))
    assert "expected" not in current(waiting).text


def test_allocated_nodes_are_named() -> None:
    running = replace(launched(), job=job("RUNNING", nodes=("n1", "n2", "n3", "n4"), start=T0 + 60))
    assert seen(running)["nodes allocated"].text == "n1 n2 n3 n4"
    assert current(running).name == "ranks joined"


def test_nodes_that_are_being_prepared_are_not_called_queued() -> None:
    configuring = replace(launched(), job=job("CONFIGURING", start=T0 + 60))
    assert seen(configuring)["queued"].state == "done"
    assert current(configuring).text == "the nodes are being prepared"


def test_a_rank_that_has_not_joined_is_named_by_its_node() -> None:
    running = replace(launched(), job=job("RUNNING", nodes=("n1", "n2", "n3", "n4")))
    some = with_joined(running, {0: "n1", 1: "n2", 3: "n4"}, T0 + 70)
    assert current(some).text == "3/4, missing n3"


def test_ranks_are_named_when_hosts_call_themselves_something_else() -> None:
    running = replace(launched(), job=job("RUNNING", nodes=("n1", "n2", "n3", "n4")))
    some = with_joined(running, {0: "n1.cluster", 2: "n3.cluster"}, T0 + 70)
    assert current(some).text == "2/4, missing rank 1, rank 3"


def test_loading_engines_show_their_own_progress() -> None:
    loading = fold(
        launched(),
        [*WAY_TO_READY[:9], at(82, "engine-loading", replica="decode-0", progress="weights 3/8")],
    )
    assert current(loading) == Rung(
        name="engines loading", state="now", text="1/2 ready; decode-0 weights 3/8"
    )


def test_an_engine_that_died_while_loading_is_shown_with_its_cause() -> None:
    dying = fold(
        launched(),
        [
            *WAY_TO_READY[:8],
            at(
                70,
                "engine-died",
                replica="decode-0",
                cause="out-of-memory",
                message="decode-0 ran out of GPU memory",
                restart_in=4,
            ),
        ],
    )
    assert "decode-0 died: decode-0 ran out of GPU memory, starts again in 4 s" in current(dying).text


def test_the_kv_rung_waits_for_bytes_not_for_an_answer() -> None:
    silent = fold(
        launched(),
        [*WAY_TO_READY[:-3], at(91, "kv-path", prefill="prefill-0", decode="decode-0", bytes=0, ok=False)],
    )
    assert current(silent).text == "no KV bytes moved: prefill-0 → decode-0"


def test_the_whole_way_has_the_times_at_which_things_happened() -> None:
    ready = seen(fold(launched(), WAY_TO_READY))
    assert [rung.state for rung in ready.values()] == ["done"] * 7
    assert {name: rung.at and rung.at - T0 for name, rung in ready.items()} == {
        "queued": 60,
        "nodes allocated": 60,
        "ranks joined": 65,
        "engines loading": 90,
        "KV path proven": 91,
        "first token": 92,
        "READY": 92.5,
    }
    assert ready["KV path proven"].text == "512.0 KiB moved by 1 real answer"
    assert ready["READY"].text == "http://n1:20000/v1"


def test_aggregated_launches_have_no_kv_rung() -> None:
    assert "KV path proven" not in seen(replace(launched("aggregated-0"), disaggregated=False))


def test_a_job_that_ends_early_fails_at_the_rung_it_had_reached() -> None:
    dead = replace(fold(launched(), WAY_TO_READY[:6]), job=job("NODE_FAIL"))
    assert dead.finished
    assert current(dead).name == "engines loading"
    assert current(dead).state == "failed"


def test_a_failed_event_ends_the_wait_while_the_job_still_cleans_up() -> None:
    failed = fold(
        replace(launched(), job=job("RUNNING")),
        [*WAY_TO_READY[:1], at(99, "failed", message="rank 3 (n4) never joined", hint="look", exit_code=6)],
    )
    assert failed.finished
    assert current(failed).state == "failed"


def test_a_requeued_job_begins_anew() -> None:
    again = fold(launched(), [*WAY_TO_READY, at(500, "job-started", node="n7")])
    assert not again.finished
    assert current(again, 501).name == "ranks joined"
    assert seen(again, 501)["ranks joined"].text.startswith("0/4")


def test_events_of_a_newer_version_are_passed_over() -> None:
    assert fold(launched(), [at(1, "coffee-served", cups=2)]) == launched()


@given(st.permutations(WAY_TO_READY[1:]))
def test_whatever_the_order_of_arrival_ready_means_every_rung_is_done(order: list[Mapping[str, Any]]) -> None:
    states = [rung.state for rung in rungs(fold(launched(), [WAY_TO_READY[0], *order]), T0 + 100)]
    assert states == ["done"] * 7


@given(st.lists(st.sampled_from(WAY_TO_READY)))
def test_rungs_are_done_then_one_is_current_then_the_rest_is_ahead(events: list[Mapping[str, Any]]) -> None:
    states = [rung.state for rung in rungs(fold(launched(), events), T0 + 100)]
    assert states == sorted(states, key=["done", "now", "ahead"].index)
    assert states.count("now") == (0 if states[-1] == "done" else 1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0.0 s"), (0.42, "0.4 s"), (12.4, "12 s"), (185, "3:05"), (3723, "1:02:03"), (2.7e5, "3-03:00:00")],
)
def test_durations_are_written_as_slurm_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_have_units() -> None:
    assert size(512) == "512 B"
    assert size(524288) == "512.0 KiB"
    assert size(3 * 2**30) == "3.0 GiB"


def test_the_links_have_a_rung_where_they_are_measured_with_the_slowest_pair() -> None:
    measuring = fold(replace(launched(), has_preflight=True), WAY_TO_READY[:6])
    assert current(measuring).name == "links measured"
    slowest = {"prefill": "n1", "decode": "n3", "gbs": 3.0, "ratio": 0.06, "transport": "rc_mlx5/mlx5_0:1"}
    event = at(65.5, "preflight", pairs=4, failed=1, unmeasured=2, seconds=0.5, slowest=slowest)
    assert seen(fold(measuring, [event]))["links measured"] == Rung(
        name="links measured",
        state="done",
        text="4 pairs, 1 failed, 2 not measured, slowest n1 → n3 3 GB/s (6% of the link)",
        at=T0 + 65.5,
    )


def test_a_preflight_that_left_no_word_does_not_hold_the_ladder() -> None:
    ready = seen(fold(replace(launched(), has_preflight=True), WAY_TO_READY))
    assert (ready["links measured"].state, ready["links measured"].text) == ("done", "")


def test_a_preflight_without_any_figure_says_so() -> None:
    event = at(65.5, "preflight", pairs=0, failed=0, unmeasured=0, seconds=0.5, slowest=None)
    assert seen(fold(replace(launched(), has_preflight=True), [event]))["links measured"].text == "0 pairs"
