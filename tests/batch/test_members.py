"""Members: who lives, by Slurm's word, by the process table, and by the file system's clock."""

from __future__ import annotations

import os

import pytest

from hpcserve.batch import members as module
from hpcserve.batch.members import Member, Members, started, this_process

HOST = os.uname().nodename
HERE = this_process({})


def member(name: str, **fields: object) -> Member:
    usual = {"host": "elsewhere", "pid": 1, "started": 1, "slurm_job": None, "restarts": 0}
    return Member(name=name, **(usual | fields))  # type: ignore[arg-type]


def joined(directory, one: Member, slurm: dict[str, bool | None] | None = None) -> Members:
    members = Members(directory, one, (slurm or {}).get)
    members.join()
    return members


def test_a_process_of_this_host_lives_while_it_runs(tmp_path):
    mine = joined(tmp_path, HERE)
    joined(tmp_path, member("gone", host=HOST, pid=os.getpid(), started=HERE.started + 1))
    assert started(os.getpid()) == HERE.started
    assert mine.alive(HERE.name)
    assert not mine.alive("gone")
    assert not mine.alive("never-joined")
    assert mine.living() == [HERE.name]


def test_slurm_says_whether_a_job_lives_and_is_asked_when_told_to(tmp_path):
    slurm: dict[str, bool | None] = {"7": True}
    mine = joined(tmp_path, member("me", slurm_job="9"), slurm)
    joined(tmp_path, member("other", slurm_job="7"))
    mine.refresh()
    assert mine.living() == ["me", "other"]
    slurm["7"] = False
    assert mine.alive("other"), "it was not asked again"
    mine.refresh()
    assert mine.living() == ["me"]


@pytest.mark.parametrize("skew", [-600.0, 600.0])
def test_where_slurm_is_silent_the_file_systems_own_clock_decides(tmp_path, monkeypatch, skew):
    mine = joined(tmp_path, member("me", host="here", slurm_job="9"), {"7": None})
    joined(tmp_path, member("other", slurm_job="7"))
    mine.refresh()
    monkeypatch.setattr("time.time", lambda: os.stat(tmp_path / "me").st_mtime + skew)
    assert mine.alive("other")
    old = os.stat(tmp_path / "other").st_mtime - module._STALE - 5
    os.utime(tmp_path / "other", (old, old))
    assert not mine.alive("other")


def test_an_earlier_driver_of_the_same_job_is_dead(tmp_path):
    mine = joined(tmp_path, member("me", slurm_job="9", restarts=1), {"9": True})
    joined(tmp_path, member("before", slurm_job="9", restarts=0))
    mine.refresh()
    assert not mine.alive("before")


def test_who_leaves_lives_no_more(tmp_path):
    mine = joined(tmp_path, HERE)
    other = joined(tmp_path, member("other", host=HOST, pid=os.getpid(), started=HERE.started))
    assert mine.living() == sorted([HERE.name, "other"])
    other.leave()
    assert mine.living() == [HERE.name]
