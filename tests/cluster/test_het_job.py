"""Prefill on small nodes and decode on big ones, as one heterogeneous job."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from hpcserve.plan.plan import RENDEZVOUS_TIMEOUT
from tests.patience import DEADLINE

from .launched import Launched, Launches
from .test_fake_disaggregated import complete, in_rotation, worker_out
from .testbed import Testbed, wait_for

# The first component is on n3 and n4: nodes that come after those of the second in Slurm's own order.
MODEL = """\
model: example/nothing-to-load
served_name: fake
engine: fake
walltime: 00:20:00
prefill: {node_type: small, nodes: 2, replicas: 2, tensor_parallel: 2}
decode: {node_type: big, nodes: 2, replicas: 2, tensor_parallel: 4}
max_model_len: 4096
engine_args: {itl-ms: 20}
"""


@pytest.fixture
def run(launches: Launches) -> Iterator[Launched]:
    launched = launches.launch(MODEL, name="het")
    # PMIx, which can't join the components, mostly refuses at once; when it hangs, the ranks give up on it.
    launched.wait_ready(RENDEZVOUS_TIMEOUT + DEADLINE)
    yield launched
    launched.cancel()


def test_two_types_of_nodes_are_one_endpoint_that_outlives_a_node(cluster: Testbed, run: Launched) -> None:
    ranks = {item["rank"]: item for item in json.loads((run.run_dir / "roster.json").read_text())["ranks"]}
    assert [ranks[rank]["node"] for rank in range(4)] == ["n3", "n4", "n1", "n2"]
    assert [len(ranks[rank]["gpus"]) for rank in range(4)] == [2, 2, 4, 4]
    for rank in range(4):
        assert (run.run_dir / "logs" / f"agent-{rank}.log").exists()
    assert json.loads((run.run_dir / "head.json").read_text())["node"] == "n3"
    # Where PMIx can't join the components, the meeting goes on without it, and says so.
    assert run.events("rendezvous")[0]["transport"] == "tcp"
    assert "warning: the rendezvous can't use mpi here" in (run.run_dir / "logs" / "job.log").read_text()

    status, answer = complete(run)
    assert status == 200 and answer["usage"]["completion_tokens"] == 8
    seen = run.status()
    assert seen["state"] == "ready" and seen["job"]["state"] == "RUNNING"
    assert seen["job"]["nodes"] == ["n3", "n4", "n1", "n2"]

    doomed = next(name for name in ("decode-0", "decode-1") if run.node_of(name) == "n2")
    cluster.kill_node("n2")
    cluster.slurm("scontrol", "update", "nodename=n2", "state=down", "reason=killed")
    wait_for(lambda: worker_out(run, doomed), what=f"{doomed} to leave", state=run.logs)
    for number in range(4):
        assert complete(run, f"new {number}")[0] == 200
    assert doomed not in in_rotation(run)
    states = cluster.slurm("squeue", "--noheader", "--jobs", run.job_id, "--format=%T").split()
    assert states == ["RUNNING", "RUNNING"]

    cluster.revive_node("n2")
    # What `stop` does where the controller does not answer: the script's signal alone.
    cluster.as_user("hsuser", ["scancel", "--signal=TERM", "--batch", run.job_id])
    run.wait_gone()
    for host in cluster.hosts:
        assert cluster.commands_of("hsuser", host.name) == []
    assert run.events("stopped")
