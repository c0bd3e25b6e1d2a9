"""Files of KV blocks that jobs share: whole or not read, and never more than is allowed."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from hpcserve.engines import kv_files
from hpcserve.engines.kv_files import (
    ROOM,
    Allowance,
    DamagedFile,
    KvFiles,
    allow,
    fingerprint,
    make_directory,
    need_directory,
    need_room,
    unfinished,
)
from hpcserve.errors import StorageError

SIZE = 3 * 4096
LAYOUT = {"cache_dtype": "bfloat16", "tensor_parallel": 2, "groups": [[0, 16, ["layers.0"]]]}
KEY = bytes(range(32))


def chunks(directory: Path, **other: Any) -> KvFiles:
    return KvFiles(str(directory), "llama", {**LAYOUT, **other}, SIZE)


def data(seed: int = 1) -> memoryview:
    return memoryview(bytearray(bytes([seed]) * (SIZE - 1) + b"!"))


def test_what_is_written_is_read_by_others_with_the_same_layout(tmp_path: Path) -> None:
    make_directory(str(tmp_path / "kv"))
    ours, theirs = chunks(tmp_path / "kv"), chunks(tmp_path / "kv")
    path = ours.path(KEY, 0)
    assert not theirs.has(path)
    assert ours.write(path, data()) > SIZE
    assert theirs.path(KEY, 0) == path
    assert theirs.has(path)
    read = memoryview(bytearray(SIZE))
    theirs.read(path, read)
    assert read == data()
    # Nothing is written again.
    assert theirs.write(path, data()) == 0
    for directory, _, names in os.walk(tmp_path / "kv"):
        assert os.stat(directory).st_mode & 0o777 == 0o700
        assert {os.stat(os.path.join(directory, name)).st_mode & 0o777 for name in names} <= {0o600}


@pytest.mark.parametrize(
    "other",
    [{"cache_dtype": "fp8"}, {"tensor_parallel": 4}, {"groups": [[0, 32, ["layers.0"]]]}, {"weights": "x"}],
)
def test_another_layout_has_other_names_and_does_not_take_a_copy_of_the_file(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    ours, theirs = chunks(tmp_path), chunks(tmp_path, **other)
    ours.write(ours.path(KEY, 0), data())
    place = theirs.path(KEY, 0)
    assert place != ours.path(KEY, 0)
    assert not theirs.has(place)
    os.makedirs(os.path.dirname(place))
    shutil.copy(ours.path(KEY, 0), place)
    with pytest.raises(DamagedFile):
        theirs.read(place, data(0))


def truncate(path: str) -> None:
    os.truncate(path, SIZE // 2)


def empty(path: str) -> None:
    os.truncate(path, 0)


def hole(path: str) -> None:
    """As long as it should be, with pages that never came: what a crash of Lustre's client may leave."""
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))


def without_end(path: str) -> None:
    with open(path, "r+b") as file:
        file.seek(SIZE)
        file.write(bytes(4096))


@pytest.mark.parametrize("damage", [truncate, empty, hole, without_end])
def test_what_a_dead_job_left_is_not_read_as_good(tmp_path: Path, damage: Any) -> None:
    ours = chunks(tmp_path)
    path = ours.path(KEY, 0)
    ours.write(path, data())
    damage(path)
    with pytest.raises(DamagedFile):
        ours.read(path, data(0))
    assert not os.path.exists(path)
    with pytest.raises(FileNotFoundError):
        ours.read(path, data(0))
    assert ours.write(path, data()) > SIZE
    ours.read(path, data(0))


def test_a_short_file_is_not_said_to_be_there_and_is_replaced(tmp_path: Path) -> None:
    ours = chunks(tmp_path)
    path = ours.path(KEY, 0)
    ours.write(path, data())
    truncate(path)
    assert not ours.has(path)
    assert ours.write(path, data()) > SIZE
    assert ours.has(path)


def test_two_jobs_write_the_same_chunk_at_once(tmp_path: Path) -> None:
    jobs = [chunks(tmp_path) for _ in range(4)]
    path, together = jobs[0].path(KEY, 0), threading.Barrier(len(jobs))
    failed: list[BaseException] = []

    def write(job: KvFiles) -> None:
        try:
            together.wait()
            for _ in range(50):
                job.write(path, data())
                job.read(path, memoryview(bytearray(SIZE)))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, write = chunks(tmp_path), os.write

    def full(descriptor: int, part: memoryview) -> int:
        if len(part) > 4096:
            return write(descriptor, part[:4096])
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(kv_files.os, "write", full)
    with pytest.raises(OSError, match="quota"):
        ours.write(ours.path(KEY, 0), data())
    assert os.listdir(os.path.dirname(ours.path(KEY, 0))) == []


def test_unfinished_files_are_found_when_they_are_old(tmp_path: Path) -> None:
    old, new = tmp_path / "a" / "x.bin.node.1.2.tmp", tmp_path / "a" / "y.bin.node.1.2.tmp"
    for path in (old, new, tmp_path / "a" / "z.bin"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    os.utime(old, (1, 1))
    assert list(unfinished(str(tmp_path), 3600)) == [str(old)]


def test_nothing_is_allowed_before_the_first_look_and_each_look_allows_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_files, "_READ_AGAIN", 0.0)
    writer = Allowance(str(tmp_path / ROOM))
    assert not writer.take(1)
    allow(tmp_path, 1, 100)
    assert [writer.take(40) for _ in range(3)] == [True, True, False]
    # Whoever looked died: there is no more.
    assert not writer.take(40)
    allow(tmp_path, 2, 100)
    assert writer.take(100)
    allow(tmp_path, 3, 100)
    assert writer.take(50)
    writer.stop()
    assert not writer.take(1)
    allow(tmp_path, 4, 100)
    assert writer.take(1)
    (tmp_path / ROOM).write_text("{")
    assert not writer.take(100)


def test_a_directory_that_others_can_reach_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "kv"
    directory.mkdir(mode=0o700)
    directory.chmod(0o750)
    with pytest.raises(StorageError, match="mode 0700") as refused:
        make_directory(str(directory))
    assert "chmod 700" in refused.value.hint
    directory.chmod(0o700)
    make_directory(str(directory))
    need_directory(str(directory))
    directory.chmod(0o770)
    with pytest.raises(StorageError, match="mode 0700"):
        need_directory(str(directory))


def test_a_directory_of_the_same_name_on_a_nodes_own_disk_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "kv", tmp_path / "none"):
        with pytest.raises(StorageError, match="not the directory for KV blocks that the launch made"):
            need_directory(str(path))
        (tmp_path / "kv").mkdir(mode=0o700, exist_ok=True)


def test_room_is_asked_for_with_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.bin").write_bytes(os.urandom(1 << 20))
    monkeypatch.setattr(kv_files, "free_bytes", lambda path: 1 << 20)
    need_room(str(tmp_path), 2 << 20)
    with pytest.raises(StorageError) as refused:
        need_room(str(tmp_path), 3 << 30)
    assert refused.value.message == f"kv_offload.shared_gib is 3, but {tmp_path} has room for 0.0 GiB"


def test_weights_that_are_replaced_have_another_fingerprint(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "modeling.py", "README.md", ".hidden"):
        (tmp_path / name).write_text(name)
    was = fingerprint(str(tmp_path))
    (tmp_path / "README.md").write_text("new")
    assert fingerprint(str(tmp_path)) == was
    # A staged copy keeps the times of its files.
    shutil.copytree(tmp_path, tmp_path / "copy", ignore=lambda *_: {"copy"})
    assert fingerprint(str(tmp_path / "copy")) == was
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert fingerprint(str(tmp_path)) != was
    file = tmp_path / "model.gguf"
    file.write_text("x")
    was = fingerprint(str(file))
    file.write_text("xy")
    assert fingerprint(str(file)) != was


def test_weights_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="in the cache of the Hugging Face hub"):
        fingerprint("org/tiny")
    with pytest.raises(FileNotFoundError, match="in the cache of the Hugging Face hub"):
        fingerprint("/models/gone")
    model = tmp_path / "models--org--tiny"
    for commit in ("aaa", "bbb"):
        (model / "snapshots" / commit).mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (model / "snapshots" / commit / name).write_text(commit + name)
    (model / "refs").mkdir()
    (model / "refs/main").write_text("aaa")
    (model / "refs/other").write_text("bbb")
    assert fingerprint("org/tiny") == fingerprint(str(model / "snapshots/aaa"))
    assert fingerprint("org/tiny", "other") == fingerprint(str(model / "snapshots/bbb"))
    assert fingerprint("org/tiny") != fingerprint("org/tiny", "other")
