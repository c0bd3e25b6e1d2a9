"""Engines publish KV events in their private directory, unless `engine_args` say otherwise."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hpcserve import engines
from hpcserve.engines.kv_events.endpoints import in_directory, ranks_on
from tests.plan.cases import model, site, tp

from .cases import command, context, flags


@pytest.mark.parametrize("engine", ["vllm", "fake"])
def test_what_the_engine_is_told_is_where_the_agent_reads(engine: str) -> None:
    spec = model(engine=engine, prefill=tp(4), decode=tp(4))
    told = json.loads(
        flags(command(spec, site(), replica="decode-0", nodes=2).argv)["--kv-events-config"] or ""
    )
    (read,) = engines.get(engine).kv_event_endpoints(context(spec, site(), replica="decode-0", nodes=2))
    assert told["enable_kv_cache_events"] is True
    assert (told["endpoint"], told["replay_endpoint"]) == (read.events, read.replay)
    assert read.events.startswith("ipc:///tmp/job/")


@pytest.mark.parametrize("engine", ["vllm", "fake"])
@pytest.mark.parametrize(
    "args",
    [
        {"kv-events-config": {"enable_kv_cache_events": False}},
        {"kv_events_config": {"enable_kv_cache_events": True, "endpoint": "tcp://*:5557"}},
    ],
)
def test_engine_args_have_the_last_word(engine: str, args: dict[str, Any]) -> None:
    spec = model(engine=engine, prefill=tp(4), decode=tp(4), engine_args=args)
    argv = command(spec, site(), replica="decode-0", nodes=2).argv
    (given,) = args.values()
    assert json.loads(flags(argv)["--kv-events-config"] or "") == given
    assert argv.count("--kv-events-config") == 1
    assert engines.get(engine).kv_event_endpoints(context(spec, site(), replica="decode-0", nodes=2)) == ()


def test_a_directory_too_deep_for_unix_sockets_turns_the_events_off() -> None:
    spec = model(prefill=tp(4), decode=tp(4))
    deep = "/lscratch/" + "x" * 90
    made = command(spec, site(), replica="decode-0", nodes=2, scratch=deep)
    assert "--kv-events-config" not in made.argv
    assert in_directory(deep) == ()


def test_sockets_of_all_ranks_stay_below_the_limit_of_a_path() -> None:
    for endpoint in in_directory("/tmp/hs-12345678/decode-10", range(64)):
        assert len((endpoint.replay or "").removeprefix("ipc://")) < 60


@pytest.mark.parametrize(
    ("nodes", "ranks", "found"),
    [
        (1, 1, [[0]]),
        (1, 4, [[0, 1, 2, 3]]),
        (2, 8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (2, 1, [[0], []]),
        (4, 2, [[0], [], [1], []]),
    ],
)
def test_each_rank_is_read_on_the_node_of_its_scheduler(
    nodes: int, ranks: int, found: list[list[int]]
) -> None:
    assert [list(ranks_on(node, nodes=nodes, ranks=ranks)) for node in range(nodes)] == found
