"""Three nodes stage a model: every byte is read once, and all end up with all of it, or none."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpcserve.errors import JobError, StorageError
from hpcserve.node.staging import coordinator, relay, schedule
from hpcserve.node.staging.copy import Copy
from hpcserve.node.staging.links import Place
from hpcserve.node.staging.source import Listing, SourceFile, list_model
from hpcserve.node.staging.store import Store
from hpcserve.node.staging.trouble import LostNeighbour, NotStaged
from hpcserve.node.staging.worker import Worker
from tests.node.runs import events

from .nodes import Nodes, OwnDisk, files_of, make_model, staged


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nodes:
    # Some dozen chunks out of a few MiB.
    monkeypatch.setattr(schedule.schedule, "__defaults__", (500_000,))
    return Nodes(tmp_path, make_model(tmp_path / "models" / "Tiny-1B"))


async def test_every_byte_is_read_once_and_all_nodes_have_all_of_them(nodes: Nodes) -> None:
    names = files_of(nodes.model)
    size = sum((nodes.model / name).stat().st_size for name in names)
    path, run = await nodes.stage()
    assert Path(path).name == "Tiny-1B"
    told = staged(run)
    assert (told["bytes"], told["read"], told["nodes"], told["reused"]) == (size, size, 3, 0)
    for rank in range(3):
        nodes.same(rank, names)
        assert nodes.own(rank).stat().st_mode & 0o777 == 0o700
    shares = [worker._relay.read for worker in nodes.workers if worker._relay]
    # Each read about a third, to within a chunk.
    assert len(shares) == 3 and sum(shares) == size and max(shares) - min(shares) <= 1_000_000


async def test_the_next_job_reads_nothing(nodes: Nodes) -> None:
    first, _ = await nodes.stage()
    inodes = [path.stat().st_ino for path in nodes.copies(0)[0].iterdir()]
    second, run = await nodes.stage()
    assert second == first
    assert (staged(run)["read"], staged(run)["reused"]) == (0, 3)
    assert [path.stat().st_ino for path in nodes.copies(0)[0].iterdir()] == inodes


async def test_a_node_without_the_model_gets_it_from_those_that_have_it(nodes: Nodes) -> None:
    await nodes.stage()
    nodes.own(1).rename(nodes.root / "replaced")
    _, run = await nodes.stage()
    assert (staged(run)["read"], staged(run)["reused"]) == (0, 2)
    nodes.same(1, files_of(nodes.model))


async def test_a_damaged_file_is_copied_again_and_the_others_are_kept(nodes: Nodes) -> None:
    await nodes.stage()
    (copy,) = nodes.copies(2)
    damaged, kept = copy / "model-1.safetensors", (copy / "model-2.safetensors").stat().st_ino
    times = damaged.stat()
    damaged.write_bytes(bytes(5_000_003))
    os.utime(damaged, ns=(times.st_atime_ns, times.st_mtime_ns))  # size and mtime are as they were
    _, run = await nodes.stage()
    nodes.same(2, files_of(nodes.model))
    assert (copy / "model-2.safetensors").stat().st_ino == kept
    assert (staged(run)["read"], staged(run)["reused"]) == (0, 2)


async def test_what_a_killed_job_left_is_gone_on_with(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Copy.finish

    def dies(self: Copy, index: int, descriptor: int) -> None:
        finish(self, index, descriptor)
        if self.listing.files[index].name == "model-1.safetensors":
            raise OSError(5, "the node was switched off")

    with monkeypatch.context() as patch:
        patch.setattr(Copy, "finish", dies)
        with pytest.raises(NotStaged, match="switched off"):
            await nodes.stage()
    assert [nodes.copies(rank) for rank in range(3)] == [[], [], []]
    _, run = await nodes.stage()
    # At least one node had model-1 whole, and nobody read it again.
    assert staged(run)["read"] <= staged(run)["bytes"] - 5_000_003
    for rank in range(3):
        nodes.same(rank, files_of(nodes.model))


async def test_a_copy_that_can_not_be_read_is_no_reason_to_end_the_run(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.preadv

    def fails(descriptor: int, *rest: Any) -> int:
        if "/disk" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(5, "Input/output error")
        return read(descriptor, *rest)

    await nodes.stage()
    nodes.own(1).rename(nodes.root / "replaced")
    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(NotStaged, match=r"rank [02] .*can't read from .*/disk[02]/.*Input/output error"):
        await nodes.stage()


async def test_a_disk_that_fails_while_it_is_sent_from_is_no_lost_neighbour(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "sendfile", fails)
    with pytest.raises(NotStaged, match=r"can't read from .*Input/output error"):
        await nodes.stage()


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EHOSTUNREACH])
def test_a_neighbour_that_goes_before_the_last_word_is_lost(nodes: Nodes, number: int) -> None:
    class Cut(socket.socket):
        def sendall(self, *_: Any) -> None:
            raise OSError(number, os.strerror(number))

    store = Store(str(nodes.disk(0)))
    with Cut() as link, pytest.raises(LostNeighbour):
        copy = Copy(store, list_model(str(nodes.model)))
        held = frozenset(range(len(copy.listing.files)))
        relay.Relay(copy, held, [], Place(0, 2), [], [link]).run()
    copy.close()


async def test_a_full_disk_on_one_node_is_everybodys(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    write = relay._write_at
    full = nodes.disk(1)

    def fills(descriptor: int, piece: memoryview, offset: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(full):
            raise OSError(28, "No space left on device")
        write(descriptor, piece, offset)

    monkeypatch.setattr(relay, "_write_at", fills)
    with pytest.raises(NotStaged, match=r"rank 1 \(n1\).*No space left") as caught:
        await nodes.stage()
    assert "node_local" in str(caught.value.hint)
    assert [nodes.copies(rank) for rank in range(3)] == [[], [], []]
    # Half a model does not stay on a full disk.
    assert list(nodes.own(1).glob("*/partial")) == []


async def test_no_room_is_known_before_a_byte_is_read(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcserve.node.staging.store.Store.free", lambda self: 4 << 20)
    with pytest.raises(NotStaged, match=r"has 0\.0 GiB free, and the model needs 0\.1 GiB"):
        await nodes.stage()
    assert all(worker._relay is None for worker in nodes.workers)


async def test_a_model_that_memory_can_not_hold_is_not_staged_to_memory(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpcserve.node.staging.store.Store.file_system", lambda self: "tmpfs")
    monkeypatch.setattr("hpcserve.node.staging.worker.memory_for_files", lambda environ: 1 << 20)
    with pytest.raises(NotStaged, match=r"is in memory \(tmpfs\)") as caught:
        await nodes.stage()
    assert "disk" in str(caught.value.hint)


async def test_a_shared_directory_is_no_nodes_own(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcserve.node.staging.store.Store.file_system", lambda self: "nfs4")
    with pytest.raises(NotStaged, match=r"is on a shared file system \(nfs4\)"):
        await nodes.stage()


async def test_a_name_that_leads_elsewhere_is_not_written(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(path: str) -> Listing:
        return replace(list_model(path), files=(SourceFile(name="../../x", size=1, mtime_ns=0),))

    monkeypatch.setattr(coordinator, "list_model", listed)
    with pytest.raises(JobError, match="leads out of the copy"):
        await nodes.stage()


async def test_bytes_that_change_on_the_way_are_noticed(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = relay._send_file

    def flips(link: socket.socket, descriptor: int, chunk: schedule.Chunk) -> None:
        if chunk.offset:
            send(link, descriptor, chunk)
            return
        data = bytearray(os.pread(descriptor, chunk.length, chunk.offset))
        data[-1] ^= 1
        link.sendall(data)

    monkeypatch.setattr(relay, "_send_file", flips)
    with pytest.raises(NotStaged, match="changed on their way"):
        await nodes.stage()
    assert nodes.copies(0) == []


async def test_a_model_that_a_node_sees_otherwise_ends_the_run(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = list_model

    def then_written(path: str) -> Any:
        found = listed(path)
        (nodes.model / "model-1.safetensors").write_bytes(bytes(17))
        return found

    monkeypatch.setattr(coordinator, "list_model", then_written)
    monkeypatch.setattr("hpcserve.node.staging.source.open_source.__kwdefaults__", {"pauses": (0.01,)})
    with pytest.raises(JobError, match="has 17 bytes") as caught:
        await nodes.stage()
    assert not isinstance(caught.value, NotStaged)
    assert "being copied" in str(caught.value.hint)


async def test_a_model_that_is_not_whole_ends_the_run(nodes: Nodes) -> None:
    (nodes.model / "model-4.safetensors").symlink_to("../../blobs/none")
    with pytest.raises(StorageError, match=r"model-4\.safetensors does not exist, or is a link to nothing"):
        await nodes.stage()


class Dies(OwnDisk):
    """Rank 2 is gone once it is to stage."""

    def _obey(self, order: Mapping[str, Any], *rest: Any) -> bool:
        if order["do"] == "go" and self._rank == 2:
            return False
        return super()._obey(order, *rest)


async def test_a_lost_node_is_named(nodes: Nodes) -> None:
    with pytest.raises(JobError, match=r"lost rank 2 \(n2\) while the model was staged") as caught:
        await nodes.stage(Dies)
    assert not isinstance(caught.value, NotStaged)
    assert nodes.copies(0) == []


async def test_two_jobs_at_once_make_one_copy(nodes: Nodes) -> None:
    (first, one), (second, other) = await asyncio.gather(nodes.stage(), nodes.stage())
    assert first == second
    told = [staged(one), staged(other)]
    # One of them read the model, each byte once; the other waited for it.
    assert sorted(event["read"] for event in told) == [0, told[0]["bytes"]]
    for rank in range(3):
        nodes.same(rank, files_of(nodes.model))


async def test_ranks_that_share_a_directory_make_one_copy_in_it(nodes: Nodes) -> None:
    shared = nodes.disk(0)

    class OneMachine(Worker):
        pass

    for rank in (1, 2):
        nodes.disk(rank).rmdir()
        (nodes.root / f"disk{rank}").symlink_to(shared)
    nodes.disk = lambda rank: shared  # type: ignore[method-assign]
    path, run = await nodes.stage(OneMachine)
    assert Path(path) == nodes.copies(0)[0]
    assert (staged(run)["nodes"], staged(run)["read"]) == (1, staged(run)["bytes"])


async def test_different_paths_on_two_nodes_are_of_no_use(nodes: Nodes) -> None:
    with pytest.raises(NotStaged, match="not the same path on all nodes"):
        await nodes.stage(Worker)


class Idle(OwnDisk):
    async def _stage(self, *_: Any) -> None:
        """A shared file system that hangs."""


async def test_it_is_over_when_ready_timeout_is(nodes: Nodes) -> None:
    with pytest.raises(JobError, match=r"not staged within ready_timeout \(1 s\)"):
        await nodes.stage(Idle, ready_timeout=1)


async def test_events_tell_how_far_it_is(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "_REPORT", 0.0)
    _, run = await nodes.stage()
    for event in events(run, "staging"):
        assert 0 <= event["bytes"] <= event["total"] and event["rate"] >= 0
    assert events(run, "staging")
