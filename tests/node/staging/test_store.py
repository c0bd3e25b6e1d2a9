"""Whose files are believed, who may write, and what is removed for whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcserve.errors import JobError
from hpcserve.node.staging import store as stores
from hpcserve.node.staging.copy import PART, Copy, Lease
from hpcserve.node.staging.source import Listing, list_model
from hpcserve.node.staging.store import Lock, Store
from hpcserve.node.staging.trouble import NotStaged

from .nodes import make_model

FILES = {"a.safetensors": b"A" * 100, "b.safetensors": b"B" * 50}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


@pytest.fixture
def listing(tmp_path: Path) -> Listing:
    return list_model(str(make_model(tmp_path / "models" / "m", FILES)))


def write(copy: Copy, index: int) -> None:
    file = copy.listing.files[index]
    opened = copy.create(index)
    os.write(opened, (Path(copy.listing.path) / file.name).read_bytes())
    copy.finish(index, opened)
    os.close(opened)


def make_copy(store: Store, listing: Listing) -> Path:
    copy = Copy(store, listing)
    assert copy.claim() == "ours"
    copy.prepare()
    for index in range(len(listing.files)):
        write(copy, index)
    copy.commit()
    copy.close()
    return copy.path


def claim(store: Store, listing: Listing) -> str:
    copy = Copy(store, listing)
    try:
        return copy.claim()
    finally:
        copy.close()


def as_link(root: Path) -> None:
    (root.parent / "elsewhere").mkdir(mode=0o700)
    root.symlink_to(root.parent / "elsewhere")


@pytest.mark.parametrize(
    "trap", [as_link, lambda root: root.write_text(""), lambda root: (root.mkdir(), root.chmod(0o755))]
)
def test_a_directory_that_others_may_have_made_is_not_used(
    tmp_path: Path, trap: Callable[[Path], object]
) -> None:
    trap(tmp_path / f"hpcserve-{os.getuid()}")
    with pytest.raises(NotStaged) as caught:
        Store(str(tmp_path))
    assert caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's directory")
def test_another_users_directory_is_not_used(tmp_path: Path) -> None:
    root = tmp_path / f"hpcserve-{os.getuid()}"
    root.mkdir(mode=0o700)
    os.chown(root, 12345, 12345)
    with pytest.raises(NotStaged, match="not a directory that only you can use"):
        Store(str(tmp_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's directory")
def test_a_parent_in_which_others_may_rename_is_not_used(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 12345)
    tmp_path.chmod(0o777)
    with pytest.raises(NotStaged, match="others may rename"):
        Store(str(tmp_path))
    tmp_path.chmod(0o1777)
    Store(str(tmp_path))


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NO_SUCH_DISK", raising=False)
    with pytest.raises(NotStaged, match=r"\$NO_SUCH_DISK"):
        Store("$NO_SUCH_DISK/x")
    monkeypatch.setenv("NO_SUCH_DISK", str(tmp_path))
    assert Store("$NO_SUCH_DISK").root.parent == tmp_path


def test_a_tmpfs_is_memory(tmp_path: Path) -> None:
    kinds = {
        line.split()[1]: line.split()[2]
        for line in Path("/proc/mounts").read_text().splitlines()
        if line.split()[2] == "tmpfs"
    }
    if "/dev/shm" not in kinds:
        pytest.skip("no tmpfs at /dev/shm here")
    store = Store.__new__(Store)
    store.root = Path("/dev/shm")
    assert store.file_system() == "tmpfs"
    store.root = Path("/proc")
    assert store.file_system() == "proc"


def test_a_whole_copy_is_found_again(store: Store, listing: Listing) -> None:
    path = make_copy(store, listing)
    assert claim(store, listing) == "complete"
    assert sorted(entry.name for entry in path.iterdir()) == ["a.safetensors", "b.safetensors", "config.json"]
    assert (path / "a.safetensors").stat().st_mode & 0o777 == 0o600


def _touch(path: Path) -> None:
    content = (path / "a.safetensors").read_bytes()
    (path / "a.safetensors").write_bytes(content)


def _swap(path: Path) -> None:
    (path / "a.safetensors").unlink()
    (path / "a.safetensors").symlink_to(path / "b.safetensors")


def _manifest(path: Path) -> None:
    manifest = path.parent / "manifest.json"
    manifest.write_text(manifest.read_text()[:20])


def _version(path: Path) -> None:
    manifest = path.parent / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 99}))


@pytest.mark.parametrize(
    "damage", [_touch, _swap, _manifest, _version, lambda path: (path / "b.safetensors").unlink()]
)
def test_a_copy_that_was_changed_is_made_again(
    store: Store, listing: Listing, damage: Callable[[Path], object]
) -> None:
    path = make_copy(store, listing)
    damage(path)
    copy = Copy(store, listing)
    assert copy.claim() == "ours"
    held = copy.prepare()
    assert not path.exists()
    for index in set(range(len(listing.files))) - held:
        write(copy, index)
    copy.commit()
    copy.close()
    assert claim(store, listing) == "complete"
    assert (path / "a.safetensors").read_bytes() == FILES["a.safetensors"]


def test_files_that_were_whole_are_kept_and_halves_are_not(store: Store, listing: Listing) -> None:
    killed = Copy(store, listing)
    assert killed.claim() == "ours"
    killed.prepare()
    write(killed, 0)
    os.close(killed.create(1))
    (killed.partial / "strange").write_text("")
    killed.close()
    copy = Copy(store, listing)
    assert copy.claim() == "ours"
    assert copy.prepare() == {0}
    assert [entry.name for entry in copy.partial.iterdir()] == [listing.files[0].name]
    assert not copy.part(1).exists() and copy.part(1).name.endswith(PART)
    copy.close()


def test_one_writes_and_readers_wait(store: Store, listing: Listing) -> None:
    writer = Copy(store, listing)
    assert writer.claim() == "ours"
    assert claim(store, listing) == "staging"
    writer.close()
    assert claim(store, listing) == "ours"


def test_a_damaged_copy_in_use_is_left_alone(store: Store, listing: Listing) -> None:
    path = make_copy(store, listing)
    lease = Lease(str(path))
    assert claim(store, listing) == "complete"
    (path / "b.safetensors").unlink()
    assert claim(store, listing) == "in use"
    lease.end(keep=True)
    assert claim(store, listing) == "ours"


def test_a_killed_process_leaves_no_lock(store: Store, listing: Listing) -> None:
    lock = store.locks / listing.fingerprint
    code = (
        "import sys, time; from pathlib import Path; from hpcserve.node.staging.store import Lock\n"
        f"lock = Lock(Path({str(lock)!r})); assert lock.exclusive()\n"
        "print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    assert claim(store, listing) == "staging"
    process.kill()
    process.wait()
    process.stdout.close()
    assert claim(store, listing) == "ours"


def other(tmp_path: Path, name: str) -> Listing:
    return list_model(str(make_model(tmp_path / "models" / name, FILES)))


def test_old_copies_make_room_and_those_in_use_do_not(
    store: Store, listing: Listing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {}
    for age, name in enumerate(("newest", "used", "older", "oldest")):
        one = other(tmp_path, name)
        paths[name] = make_copy(store, one)
        lock = store.locks / one.fingerprint
        when = lock.stat().st_mtime - stores.RECENT * (age + 1) - 1
        os.utime(lock, (when, when))
    recent = make_copy(store, other(tmp_path, "recent"))
    lease = Lease(str(paths["used"]))
    old = [ident for ident, _ in store.old_copies(keep=paths["newest"].parent.name)]
    assert old == [paths["oldest"].parent.name, paths["older"].parent.name]
    room = iter([0, 10**9, 10**9, 10**9])
    monkeypatch.setattr(Store, "free", lambda self: next(room))
    assert store.make_room(10**6, keep=listing.fingerprint) == [paths["oldest"].parent.name]
    assert not paths["oldest"].parent.exists()
    assert all(path.exists() for path in (paths["newest"], paths["used"], paths["older"], recent))
    lease.end(keep=True)


def test_a_copy_that_is_not_kept_goes_with_its_last_user(store: Store, listing: Listing) -> None:
    path = make_copy(store, listing)
    first, second = Lease(str(path)), Lease(str(path))
    first.end(keep=False)
    assert path.exists()
    second.end(keep=False)
    assert not path.parent.exists()
    with pytest.raises(JobError, match="is gone"):
        Lease(str(path))


def test_a_copy_that_another_job_just_staged_waits_for_it(
    store: Store, listing: Listing, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_copy(store, listing)
    ending = Lease(str(path))
    assert claim(store, listing) == "complete"  # another job, whose agents are to come
    ending.end(keep=False)
    coming = Lease(str(path))
    coming.end(keep=False)
    assert not path.exists()  # its own staging is no other job's
    # Agents that never came are not waited for.
    path = make_copy(store, listing)
    ending = Lease(str(path))
    assert claim(store, listing) == "complete"
    lock, past = store.locks / listing.fingerprint, time.time() - stores.RECENT - 1
    monkeypatch.setattr(ending, "_promised", past - 1)
    os.utime(lock, (past, past))
    ending.end(keep=False)
    assert not path.exists()


def test_a_lock_file_is_no_way_out(store: Store, tmp_path: Path) -> None:
    (store.locks / "x").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        Lock(store.locks / "x")
