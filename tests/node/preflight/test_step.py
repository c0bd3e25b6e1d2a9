"""Real NIXL between the processes of a step, over TCP on loopback."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.node.runs import replica

from .steps import Step, vllm_plan

pytestmark = pytest.mark.timeout(600)


def test_every_pair_gets_figures_that_come_from_bytes_that_came(tmp_path: Path) -> None:
    plan = vllm_plan(
        replica("prefill-0", 0), replica("decode-0", 1), replica("decode-1", 2), UCX_TLS="tcp,self"
    )
    with Step(tmp_path / "run", plan) as step:
        assert step.finish() == [0, 0, 0], step.log()
        pairs = step.document["pairs"]
        assert [(pair["prefill"]["replicas"], pair["decode"]["replicas"]) for pair in pairs] == [
            (["prefill-0"], ["decode-0"]),
            (["prefill-0"], ["decode-1"]),
        ]
        print(step.log())
        for pair in pairs:
            assert pair["error"] is None
            assert [figure["operation"] for figure in pair["figures"]] == ["read", "write", "read", "write"]
            assert all(figure["gbs"] > 0 for figure in pair["figures"])
            assert all(figure["transport"].startswith("tcp/lo") for figure in pair["figures"])
            assert pair["latency_us"] > 0
            assert pair["prefill"]["env"]["UCX_TLS"] == "tcp,self"
        assert step.event()["pairs"] == 2
