"""The KV preflight of launched jobs, over a second network whose links are slowed and cut.

Control traffic stays on eth0, as on a cluster where KV has a fabric of its own.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from .launched import Launched, Launches
from .namespaces import Host, ip
from .testbed import Testbed, wait_for

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

# No engine gets as far as looking for the model: the job is over before that.
MODEL = """\
model: example/nothing-to-load
served_name: nothing
engine: vllm
device: cpu
walltime: 00:20:00
prefill: {{nodes: {prefill}}}
decode: {{nodes: {decode}}}
env: {{UCX_NET_DEVICES: kv0}}
"""
_BRIDGE = "hs-kv"


def port(host: Host) -> str:
    """The switch's end of a node's cable."""
    return f"hs-k{host.index}"


@pytest.fixture
def fabric(cluster: Testbed) -> Iterator[None]:
    """An interface kv0 on every node."""
    _remove_fabric(cluster)
    ip("link", "add", _BRIDGE, "type", "bridge")
    ip("link", "set", _BRIDGE, "up")
    for host in cluster.hosts:
        ip("link", "add", port(host), "type", "veth", "peer", "name", "kv0", "netns", host.namespace)
        ip("link", "set", port(host), "master", _BRIDGE, "up")
        ip("-n", host.namespace, "address", "add", f"10.78.0.{host.index}/24", "dev", "kv0")
        ip("-n", host.namespace, "link", "set", "kv0", "up")
    yield
    _remove_fabric(cluster)


def _remove_fabric(cluster: Testbed) -> None:
    for link in (*map(port, cluster.hosts), _BRIDGE):
        subprocess.run(["ip", "link", "delete", link], capture_output=True)


def slow_down(host: Host) -> None:
    """What the node sends leaves with 20 Mbit/s."""
    command = ["tc", "qdisc", "add", "dev", "kv0", "root", "tbf", "rate", "20mbit", "burst", "32kb"]
    subprocess.run(["ip", "netns", "exec", host.namespace, *command, "latency", "400ms"], check=True)


def cut(host: Host) -> None:
    """The link stays up at both ends, and nothing arrives."""
    ip("link", "set", port(host), "nomaster")


def launch(launches: Launches, name: str, *, prefill: int, decode: int) -> Launched:
    model = MODEL.format(prefill=prefill, decode=decode)
    return launches.launch(model, name=name, nodes=prefill + decode)


def measured(run: Launched) -> dict[str, Any]:
    """preflight.json, once the step is over."""
    wait_for(lambda: run.events("preflight") or run.gone(), seconds=300, what="the preflight", state=run.logs)
    assert run.events("preflight"), run.logs()
    document: dict[str, Any] = json.loads((run.run_dir / "preflight.json").read_text())
    return document


def rates(document: dict[str, Any]) -> dict[tuple[str, str], float | None]:
    """Slowest operation by prefill and decode node, 10^9 bytes/s."""
    return {
        (pair["prefill"]["node"], pair["decode"]["node"]): pair["slowest_gbs"] for pair in document["pairs"]
    }


def show(run: Launched, capsys: pytest.CaptureFixture[str]) -> None:
    times = {event["event"]: event["t"] for event in reversed(run.events())}
    with capsys.disabled():
        print(f"\n{(run.run_dir / 'logs' / 'preflight-0.log').read_text()}", end="")
        print(f"the step took {times['preflight'] - times['rendezvous']:.1f} s of the launch")


def test_every_pair_of_a_launched_job_has_figures_over_the_device_of_model_yaml(
    launches: Launches, fabric: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = launch(launches, "links", prefill=2, decode=2)
    try:
        document = measured(run)
        wait_for(lambda: run.events("engine-starting"), what="the engines", state=run.logs)
        status = launches.hpcserve("status", run.name).stdout
    finally:
        run.cancel()
    show(run, capsys)
    expected = {(prefill, decode) for prefill in ("n1", "n2") for decode in ("n3", "n4")}
    assert set(rates(document)) == expected
    for pair in document["pairs"]:
        assert pair["error"] is None and pair["slowest_gbs"] > 0
        assert {figure["transport"].split()[0] for figure in pair["figures"]} == {"tcp/kv0"}
        # A veth pair says 10 Gbit/s, and that is no rate.
        assert pair["link_gbs"] is None
    assert "links measured: 4 pairs, slowest n" in status
    assert "KV preflight: 4 pairs measured" in (run.run_dir / "logs" / "job.log").read_text()


def test_a_slow_and_a_cut_node_are_named_and_the_job_goes_on(
    cluster: Testbed, launches: Launches, fabric: None, capsys: pytest.CaptureFixture[str]
) -> None:
    slow_down(cluster.host("n3"))
    cut(cluster.host("n4"))
    run = launch(launches, "troubled", prefill=1, decode=3)
    try:
        document = measured(run)
        wait_for(lambda: run.events("engine-starting"), what="the engines", state=run.logs)
    finally:
        run.cancel()
    show(run, capsys)
    found = rates(document)
    good, slow = found["n1", "n2"], found["n1", "n3"]
    assert good is not None and slow is not None
    assert found["n1", "n4"] is None
    assert 0.0005 < slow < 0.005, "20 Mbit/s are 0.0025 GB/s"
    warnings = {event["message"]: event["hint"] for event in run.events("warning")}
    [about_slow] = [message for message in warnings if message.startswith("n3 moves KV slowly")]
    assert "over kv0" in about_slow
    [about_cut] = [message for message in warnings if message.startswith("n4 can't move KV")]
    assert "over kv0" in about_cut and "--exclude=n4" in warnings[about_cut]
    assert run.events("preflight")[0]["failed"] == 1


def test_a_job_whose_nodes_do_not_reach_each_other_ends_before_any_engine(
    launches: Launches, fabric: None, capsys: pytest.CaptureFixture[str]
) -> None:
    ip("link", "set", _BRIDGE, "down")
    run = launch(launches, "apart", prefill=1, decode=1)
    run.wait_gone()
    show(run, capsys)
    [failed] = run.events("failed")
    assert failed["exit_code"] == 6
    assert failed["message"].startswith("no prefill node reaches any decode node by NIXL")
    assert "kv0" in failed["message"]
    assert not run.events("engine-starting")
    job = launches.cluster.slurm("scontrol", "show", "job", "--oneliner", run.job_id)
    assert "ExitCode=6:0" in job
