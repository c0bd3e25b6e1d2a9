"""Policies on small traces, with the router's own placement code."""

from __future__ import annotations

import functools

import pytest

from hpcserve.bench.replay import compare, synthetic
from hpcserve.bench.replay.engine import EngineModel
from hpcserve.bench.replay.outcome import measure
from hpcserve.bench.replay.report import table
from hpcserve.bench.replay.simulate import Setup, play
from hpcserve.cli.main import main
from hpcserve.errors import UsageError

SETUP = Setup(workers=4, engine=EngineModel(blocks=400))


@functools.cache
def trace(kind):
    return synthetic.SYNTHETIC[kind](1200, 3)


def outcome(kind, policy):
    return measure(play(trace(kind), compare.POLICIES[policy](SETUP), SETUP))


@pytest.mark.parametrize("policy", compare.POLICIES)
def test_every_request_is_answered_and_the_router_ends_up_idle(policy):
    router = compare.POLICIES[policy](SETUP)
    played = play(trace("conversation")[:300], router, SETUP)
    assert len(played.jobs) == 300
    assert all(job.finished >= job.first_token > job.request.arrival for job in played.jobs)
    for worker in getattr(router, "_workers", ()):
        load = worker.load
        assert (load.in_flight, load.prefill_tokens, load.kv_tokens) == (0.0, 0.0, 0.0)
        assert not worker.queue.sent


def test_a_run_is_the_same_again():
    assert outcome("conversation", "kv") == outcome("conversation", "kv")


def test_kv_finds_more_in_caches_and_serves_more_in_time_than_the_load_alone_does():
    for kind in ("conversation", "agents", "siblings"):
        kv, least = outcome(kind, "kv"), outcome(kind, "least_load")
        assert kv.hit_rate > least.hit_rate
        assert kv.good >= least.good


def test_kv_is_no_worse_than_least_load_where_nothing_comes_back():
    kv, least = outcome("nothing-shared", "kv"), outcome("nothing-shared", "least_load")
    assert kv.good >= least.good
    assert kv.ttft_p50 <= 1.05 * least.ttft_p50


def test_prediction_stands_in_for_events():
    with_events, without = outcome("conversation", "kv"), outcome("conversation", "kv, no events")
    assert without.hit_rate > 0.9 * with_events.hit_rate


def test_kv_finds_more_than_dynamos_formula_does():
    kv, dynamo = outcome("conversation", "kv"), outcome("conversation", "dynamo (formula)")
    assert kv.hit_rate > 1.15 * dynamo.hit_rate


def test_the_document_and_its_table():
    found = compare.compare(trace("agents")[:200], SETUP, only=("kv", "round_robin"))
    assert set(found) == {"setup", "trace", "bounds", "policies"}
    assert list(found["policies"]) == ["kv", "round_robin"]
    text = table(found)
    assert text.splitlines()[1].startswith("kv ")
    assert "one shared cache" in text


def test_a_policy_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="no policy 'best'"):
        compare.compare(trace("agents"), SETUP, only=("best",))


def test_the_command(tmp_path, capsys):
    output = tmp_path / "replay.json"
    arguments = ["--synthetic", "agents", "--requests", "60", "--workers", "2", "--only", "kv"]
    assert main(["bench", "replay", *arguments, "-o", str(output)]) == 0
    assert capsys.readouterr().out.startswith("policy")
    assert '"policies"' in output.read_text()
    assert main(["bench", "replay", "--synthetic", "nonsense"]) == 2
