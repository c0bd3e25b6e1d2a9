"""Every attempt of a job leaves exactly one `failed` or `stopped`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpcserve.node.__main__ import main
from hpcserve.node.head import head
from hpcserve.node.inputs import load_inputs
from hpcserve.node.journal import Journal, open_journal
from hpcserve.rundir.atomic import write_json
from hpcserve.rundir.events import EventLog
from hpcserve.rundir.layout import RunDir

from .runs import events, make_plan, make_run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-3]")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "4102444800")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    return make_run(tmp_path / "run", make_plan(3))


def close(run: RunDir, stage: str, status: int, *more: str) -> list[dict[str, Any]]:
    assert main(["close", "--run-dir", str(run.path), "--stage", stage, "--status", str(status), *more]) == 0
    return [event for event in events(run) if event["event"] in ("failed", "stopped")]


def test_a_rendezvous_that_srun_aborted_names_the_ranks_that_never_came(run: RunDir) -> None:
    write_json(run.rank(0), {"rank": 0, "node": "n1", "attempt": "7.0"})
    write_json(run.rank(1), {"rank": 1, "node": "n2", "attempt": "6.0"})
    [failed] = close(run, "rendezvous", 140)
    assert failed["event"] == "failed"
    assert failed["message"] == (
        "the rendezvous was ended by SIGUSR2 before all ranks had met; never started: ranks 1 (n2), 2 (n3)"
    )
    assert "job.log" in failed["hint"]
    assert failed["exit_code"] == 6
    assert [event["event"] for event in events(run)] == ["job-started", "failed"]


def test_what_a_rank_said_before_it_left_is_the_reason(run: RunDir) -> None:
    (run.path / "rendezvous").mkdir()
    for rank, attempt, code in ((0, "7.0", 75), (1, "6.0", 6), (2, "7.0", 3)):
        error = {"message": f"rank {rank} said", "hint": "h", "exit_code": code}
        entry = {"attempt": attempt, "transport": "tcp", "node": f"n{rank + 1}", "error": error}
        write_json(run.path / "rendezvous" / f"gave-up-{rank}.json", entry)
    [failed] = close(run, "rendezvous", 6)
    assert (failed["message"], failed["exit_code"]) == ("rank 2 (n3): rank 2 said", 3)


def test_a_job_told_to_end_during_the_preflight_is_stopped(run: RunDir) -> None:
    [stopped] = close(run, "preflight", 143, "--signalled")
    assert stopped["reason"] == "signal SIGTERM during the preflight, before any engine was started"


def test_a_preflight_that_ended_the_job_without_a_word_is_the_reason(run: RunDir) -> None:
    [failed] = close(run, "preflight", 6)
    assert failed["message"] == "the preflight ended with status 6 without a word"
    assert failed["exit_code"] == 6


def test_why_staging_failed_is_in_its_log(run: RunDir) -> None:
    (run.logs / "staging-0.log").write_text("error: lost rank 2 (n3)\n\nhint: launch again\n")
    [failed] = close(run, "staging", 6)
    assert (failed["message"], failed["hint"], failed["exit_code"]) == ("lost rank 2 (n3)", "launch again", 6)


def test_staging_that_was_killed_is_told_as_that(run: RunDir) -> None:
    [failed] = close(run, "staging", 137)
    assert failed["message"] == "staging the model was ended by SIGKILL without a word"


def test_a_job_told_to_end_while_it_stages_is_stopped(run: RunDir) -> None:
    [stopped] = close(run, "staging", 143, "--signalled")
    assert stopped["reason"] == "signal SIGTERM while the model was staged"


def test_a_job_told_to_end_during_the_rendezvous_is_stopped(run: RunDir) -> None:
    [stopped] = close(run, "rendezvous", 143, "--signalled")
    assert stopped["reason"] == "signal SIGTERM before the rendezvous was over"


def test_a_job_told_to_end_while_its_head_starts_is_stopped(run: RunDir) -> None:
    [stopped] = close(run, "serving", 143, "--signalled")
    assert stopped["reason"] == "signal SIGTERM before the head process was up"


def test_a_head_that_was_killed_is_told(run: RunDir) -> None:
    [failed] = close(run, "serving", 137)
    assert failed["message"] == "the head process was ended by SIGKILL without a word"
    assert failed["exit_code"] == 137


def test_a_reason_is_written_once_for_each_attempt(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(close(run, "serving", 1)) == 1
    assert len(close(run, "serving", 1)) == 1
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert len(close(run, "serving", 1)) == 2
    assert [event["event"] for event in events(run)] == ["job-started", "failed"] * 2


def test_a_head_that_crashes_by_a_bug_leaves_its_reason(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    async def crash(*_: object) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(head, "_main", crash)
    with pytest.raises(ValueError, match="no such thing"):
        main(["head", "--run-dir", str(run.path)])
    [failed] = events(run, "failed")
    assert failed["message"] == "the head process crashed: ValueError: no such thing"
    assert failed["exit_code"] == 1
    assert "bug" in failed["hint"]


def test_a_local_job_ends_its_walltime_after_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    run = make_run(tmp_path / "run", make_plan(1, walltime=600))
    close(run, "serving", 1)
    [started] = events(run, "job-started")
    assert started["end_time"] == pytest.approx(started["t"] + 600, abs=5)


class Full(EventLog):
    """An event log on a disk that is full for a while."""

    full = True

    def write(self, event: str, **fields: Any) -> None:
        if self.full:
            from hpcserve.errors import StorageError

            raise StorageError("can't append to the event log: No space left on device", hint="free space")
        super().write(event, **fields)


def test_a_full_disk_loses_events_with_one_warning_and_says_how_many(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = Full(tmp_path / "events.jsonl")
    journal = Journal(log)
    journal.write("worker-in", replica="a")
    journal.write("worker-out", replica="a")
    log.full = False
    journal.write("ready", seconds=1)
    log.close()
    shown = capfd.readouterr().err
    assert shown.count("warning: ") == 1
    assert "\nhint: free space" in shown
    written = [event for event in events(RunDir(tmp_path))]
    assert [event["event"] for event in written] == ["warning", "ready"]
    assert "2 events are missing here" in written[0]["message"]


def test_a_log_on_a_full_disk_ends_nobody(tmp_path: Path) -> None:
    import subprocess
    import sys

    # /dev/full takes no byte; a print() there fails, and once more at exit.
    with open("/dev/full", "wb") as full:
        program = "from hpcserve.node.console import say, warn; say('x'); warn('y', 'z')"
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=full, check=False)
    assert done.returncode == 0


def test_the_journal_of_an_unwritable_run_directory_is_an_error(run: RunDir) -> None:
    from hpcserve.errors import StorageError

    run.events.mkdir()
    with pytest.raises(StorageError), open_journal(load_inputs(run.path)):
        pass
