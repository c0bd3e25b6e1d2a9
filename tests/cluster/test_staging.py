"""A model on the shared file system comes to four nodes' own disks, and stays there for the next job."""

from __future__ import annotations

import json
import os
import pwd
from pathlib import Path

import pytest

from .launched import Launched, Launches
from .testbed import Testbed

SPEC = """\
model: {model}
served_name: fake
engine: fake
stage: true
walltime: 00:20:00
prefill: {{replicas: 2, nodes: 2}}
decode: {{replicas: 2, nodes: 2}}
max_model_len: 4096
"""
SHARD = 24 << 20


@pytest.fixture
def model(cluster: Testbed) -> Path:
    """A Hub cache's layout: a snapshot of links to blobs."""
    top = cluster.home("hsuser") / "models--org--Tiny-MoE"
    snapshot, blobs = top / "snapshots" / "Tiny-MoE", top / "blobs"
    for directory in (snapshot, blobs):
        directory.mkdir(parents=True, exist_ok=True)
    contents = {"config.json": b"{}"} | {f"model-{n}.safetensors": os.urandom(SHARD) for n in range(4)}
    for name, content in contents.items():
        (blobs / f"blob-{name}").write_bytes(content)
        (blobs / f"blob-{name}").chmod(0o644)
        (snapshot / name).unlink(missing_ok=True)
        (snapshot / name).symlink_to(f"../../blobs/blob-{name}")
    return snapshot


def paths_of_engines(cluster: Testbed, run: Launched) -> set[str]:
    """What `--model` of every engine is."""
    found = []
    for host in cluster.hosts:
        engines = [line for line in cluster.commands_of("hsuser", host.name) if "fake_server" in line]
        assert len(engines) == 1, run.logs()
        found.append(engines[0].split("--model ")[1].split()[0])
    return set(found)


def test_a_model_is_read_once_for_four_nodes_and_not_again(
    cluster: Testbed, launches: Launches, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = sum(path.stat().st_size for path in model.iterdir())
    first = launches.launch(SPEC.format(model=model), name="staged")
    first.wait_ready()
    (told,) = first.events("staged")
    assert (told["nodes"], told["reused"], told["bytes"], told["read"]) == (4, 0, size, size)
    assert paths_of_engines(cluster, first) == {told["path"]}
    assert Path(told["path"]).is_relative_to(f"/tmp/hpcserve-{pwd.getpwnam('hsuser').pw_uid}")
    for host in cluster.hosts:
        same = ["diff", "-r", str(model), told["path"]]
        assert cluster.as_user("hsuser", same, node=host.name, check=False).returncode == 0, host.name
        denied = cluster.as_user("hsother", ["ls", told["path"]], node=host.name, check=False)
        assert denied.returncode != 0
    assert "model staged: 96.0 MiB on 4 nodes" in launches.hpcserve("status", first.name).stdout
    first.stop()
    first.wait_gone()
    second = launches.launch(SPEC.format(model=model), name="staged-again")
    second.wait_ready()
    (again,) = second.events("staged")
    assert (again["path"], again["read"], again["reused"]) == (told["path"], 0, 4)
    assert paths_of_engines(cluster, second) == {told["path"]}
    with capsys.disabled():
        print("\n" + "\n".join(json.dumps(event) for event in (told, again)))
    second.cancel()
