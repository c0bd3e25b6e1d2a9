"""A whole run on this machine: real processes, the fake engine, no Slurm."""

from __future__ import annotations

import json
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.patience import DEADLINE

from .conftest import World

MODEL = "model: org/tiny\nengine: fake\nprefill: {nodes: 2}\ndecode: {nodes: 2}\n"
LAUNCH = ("launch", "--site", "local", "--nodes", "4")


def processes_of(path: Path) -> list[str]:
    """Command lines of live processes that name the run directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                text = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if str(path) in words and text[text.rindex(")") + 2] != "Z":
                found.append(f"{entry.name} {words}")
    return found


def nothing_left(path: Path, seconds: float = DEADLINE) -> bool:
    deadline = time.monotonic() + seconds
    while processes_of(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture
def local(world: World) -> Iterator[World]:
    world.monkeypatch.delenv("HPCSERVE_SITE")
    world.model.write_text(MODEL)
    yield world
    for run in world.runs.glob("*"):
        world("stop", run.name, "--wait", "0")
        world("stop", run.name, "--wait", "20")


@pytest.mark.timeout(300)
def test_two_prefill_and_two_decode_from_launch_to_stop(local: World) -> None:
    launched = local(*LAUNCH, "--name", "demo", "model.yaml")
    assert launched.status == 0, launched.err
    run = local.runs / "demo"
    assert "ranks joined: 4/4" in launched.err
    assert "KV path proven" in launched.err
    assert "READY" in launched.out

    [listed] = json.loads(local("ls", "--json").out)["runs"]
    assert listed["state"] == "ready"
    status = json.loads(local("status", "demo", "--json").out)
    assert status["source"] == "controller"
    names = sorted(replica["name"] for replica in status["controller"]["replicas"])
    assert names == ["decode-0", "decode-1", "prefill-0", "prefill-1"]
    assert all(replica["state"] == "ready" for replica in status["controller"]["replicas"])

    chat = local("chat", "demo", "What is the capital of France?")
    assert chat.status == 0, chat.err
    assert chat.out.strip()
    labels = {line.split("|")[0].strip() for line in local("logs", "demo").out.splitlines()}
    assert {"head", "router"} <= labels

    stopped = local("stop", "demo")
    assert stopped.status == 0
    assert "demo is over" in stopped.err
    assert nothing_left(run)
    assert json.loads(local("ls", "--json").out)["runs"][0]["state"] == "stopped"
    assert "over already" in local("stop", "demo").err
    assert local("connect", "demo").status == 8


@pytest.mark.timeout(300)
def test_keys_stay_in_their_files_and_the_endpoint_wants_them(local: World) -> None:
    assert local(*LAUNCH, "--name", "demo", "model.yaml").status == 0
    run = local.runs / "demo"
    keys = [(run / "secrets" / name).read_text().strip() for name in ("api-key", "job-key")]
    commands = " ".join(processes_of(run))
    assert not any(key in commands for key in keys)
    for path in run.rglob("*"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, f"others may use {path}"
        if path.is_file() and path.parent.name != "secrets":
            assert not any(key in path.read_text(errors="replace") for key in keys), path
    url = json.loads((run / "endpoint.json").read_text())["url"]
    with pytest.raises(urllib.error.HTTPError, match="401") as refused:
        urllib.request.urlopen(f"{url}/models", timeout=20)
    refused.value.close()


@pytest.mark.timeout(300)
def test_a_second_stop_ends_a_run_that_still_starts(local: World) -> None:
    assert local(*LAUNCH, "--name", "demo", "--no-wait", "model.yaml").status == 0
    assert local("stop", "demo", "--wait", "0").status == 0
    forced = local("stop", "demo", "--wait", "30")
    assert forced.status == 0
    assert "over" in forced.err
    assert nothing_left(local.runs / "demo")
