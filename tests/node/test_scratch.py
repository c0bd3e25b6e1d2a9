"""What a killed agent leaves on its node is removed: by its keeper, or by the next agent there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpcserve.errors import StorageError
from hpcserve.node.agent import remains
from hpcserve.node.agent import scratch as module
from hpcserve.node.agent.keeper import Keeper
from hpcserve.node.agent.remains import Remains
from hpcserve.node.agent.scratch import Scratch
from tests.patience import DEADLINE

from .runs import wait_for

AGENT = """
import pathlib, sys, time
from hpcserve.node.agent import scratch as module
from hpcserve.node.agent.keeper import Keeper
disk, module.SHARED_MEMORY, kept, name = sys.argv[1:]
keeper = Keeper()
if kept == "no":
    # As if it was killed together with its agent.
    keeper.sweep = keeper.settle = lambda _: None
made = module.Scratch(disk, keeper)
[memory] = made.expect([name])
memory.write_text("blocks")
(made.path / "decode-0/kv-blocks").mkdir(parents=True)
(made.path / "decode-0/kv-blocks/1.bin").write_text("blocks")
print(made.path, flush=True)
time.sleep(600)
"""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(module, "SHARED_MEMORY", str(tmp_path / "memory"))
    return tmp_path / "memory"


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    made = Keeper()
    yield made
    made.close()


@contextmanager
def agent(disk: Path, memory: Path, *, kept: bool, name: str = "vllm_offload_1.mmap") -> Iterator[Path]:
    """The directory of an agent that lives, and is killed then."""
    words = [sys.executable, "-c", AGENT, str(disk), str(memory), "yes" if kept else "no", name]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait(DEADLINE)
        process.stdout.close()


def locks(place: Path) -> Path:
    return place / f"hpcserve-{os.getuid()}" / "locks"


def left(*places: Path) -> list[Path]:
    own = {path for place in places for path in (locks(place), locks(place).parent)}
    # Path.rglob() fails where a directory goes while it looks.
    walked = [(parent, [*folders, *files]) for place in places for parent, folders, files in os.walk(place)]
    found = [Path(parent, name) for parent, names in walked for name in names]
    return [path for path in found if path not in own]


def test_the_keeper_removes_disk_memory_and_what_was_written_down(disk: Path, memory: Path) -> None:
    with agent(disk, memory, kept=True) as scratch:
        assert (scratch / "decode-0/kv-blocks/1.bin").exists()
        assert (memory / "vllm_offload_1.mmap").exists()
        assert [lock.name for lock in locks(memory).iterdir()] == [scratch.name]
    wait_for(lambda: not left(disk, memory), "the keeper")


def test_the_next_agent_removes_what_an_agent_and_its_keeper_left(
    disk: Path, memory: Path, keeper: Keeper
) -> None:
    others = memory / "vllm_offload_2.mmap"
    others.write_text("another program's")
    (disk / "hs-made0000").mkdir()
    with agent(disk, memory, kept=False) as dead:
        pass
    assert (dead / "decode-0/kv-blocks/1.bin").exists()
    with agent(disk, memory, kept=False, name="vllm_offload_3.mmap") as alive:
        here = Scratch(str(disk), keeper)
        here.sweep()
        wait_for(lambda: not dead.exists(), "the disk to be swept")
        wait_for(lambda: len(list(locks(disk).iterdir())) == 2, "its lock to go")
        assert {path.name for path in disk.glob("hs-*")} == {alive.name, here.path.name, "hs-made0000"}
        assert {lock.name for lock in locks(disk).iterdir()} == {alive.name, here.path.name}
        assert {lock.name for lock in locks(memory).iterdir()} == {alive.name}
        # Of this agent itself nothing is in memory yet.
        assert {path.name for path in memory.glob("vllm*")} == {"vllm_offload_2.mmap", "vllm_offload_3.mmap"}


def test_an_engine_starts_only_when_the_memory_of_killed_runs_is_free(
    disk: Path, memory: Path, keeper: Keeper
) -> None:
    with agent(disk, memory, kept=False):
        pass
    here = Scratch(str(disk), keeper)
    here.sweep()
    assert here.expect(["vllm_offload_7.mmap"]) == (memory / "vllm_offload_7.mmap",)
    assert not (memory / "vllm_offload_1.mmap").exists()
    wait_for(lambda: len(list(disk.glob("hs-*"))) == 1, "the disk to be swept")


def test_what_is_another_nodes_or_another_users_stays(
    disk: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere, linked = disk / "elsewhere", disk / "linked"
    elsewhere.mkdir()
    linked.symlink_to(elsewhere)
    made = Remains(str(disk), "hs-00000001")
    made.add([linked])
    os.close(made._file)
    monkeypatch.setattr(remains, "_node", lambda: "another-node")
    assert list(remains.sweep(str(disk))) == []
    monkeypatch.undo()
    assert list(remains.sweep(str(disk))) == [[linked]]
    # A link is nothing that an agent makes.
    assert elsewhere.exists() and linked.is_symlink()


def test_without_a_safe_place_it_says_so_and_goes_on(
    tmp_path: Path, memory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o700)
    store = tmp_path / f"hpcserve-{os.getuid()}"
    store.mkdir()
    store.chmod(0o755)  # whatever the umask is
    keeper = Keeper()
    made = Scratch(str(tmp_path), keeper)
    assert made.path.is_dir()
    said = capfd.readouterr().err
    assert "warning: what this run leaves in" in said and "remove it by hand" in said
    keeper.close()
    assert not made.path.exists()


def test_a_place_that_can_not_be_written_is_an_error(keeper: Keeper) -> None:
    with pytest.raises(StorageError, match="/proc"):
        Scratch("/proc", keeper)
