"""Rendezvous over each transport, with real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hpcserve.node.__main__ import main
from hpcserve.rundir.atomic import write_json, write_text
from hpcserve.rundir.layout import RunDir

from .bench_rendezvous import measure
from .runs import environment, events, finish, make_plan, make_run, node_program, start, wait_for

MPIRUN = Path(sys.executable).parent / "mpirun"


def meet(run: RunDir, ranks: list[int], *options: str, **env: str) -> list[tuple[int, str]]:
    command = node_program("rendezvous", run, *options)
    started = [start(command, environment(rank, **env)) for rank in ranks]
    return [finish(process) for process in started]


def roster(run: RunDir) -> dict[str, object]:
    return json.loads(run.roster.read_text())


@pytest.mark.parametrize("transport", ["tcp", "file"])
def test_eight_ranks_meet_and_leave_one_roster(tmp_path: Path, transport: str) -> None:
    run = make_run(tmp_path / "run", make_plan(8))
    results = meet(run, list(range(8)), "--transport", transport)
    assert [status for status, _ in results] == [0] * 8, results
    found = roster(run)
    assert found["transport"] == transport
    assert [entry["rank"] for entry in found["ranks"]] == list(range(8))
    assert len({entry["machine_id"] for entry in found["ranks"]}) == 1
    assert found["ranks"][0]["address"] == "127.0.0.1"
    assert "8 ranks met over" in results[0][1]
    assert sorted(event["rank"] for event in events(run, "rank-joined")) == list(range(8))
    assert [event["transport"] for event in events(run, "rendezvous")] == [transport]


def test_ranks_meet_over_mpi(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_plan(3))
    process = start(
        [
            *("timeout", "--kill-after=5", "40"),
            str(MPIRUN),
            "--allow-run-as-root",
            "--oversubscribe",
            "-n",
            "3",
            *node_program("rendezvous", run, "--transport", "mpi"),
        ],
        environment(),
    )
    status, output = finish(process, 90)
    assert status == 0, output
    assert roster(run)["transport"] == "mpi"
    assert [entry["rank"] for entry in roster(run)["ranks"]] == [0, 1, 2]
    assert "3 ranks met over MPI" in output


def test_mpi_world_of_size_one_is_an_error_that_names_the_plugin(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_plan(2))
    [(status, output)] = meet(run, [0], "--transport", "mpi")
    assert status == 75, output
    assert "COMM_WORLD has 1 rank, 2 were expected" in output
    assert "srun --mpi=list" in output
    assert not run.roster.exists()
    assert "no rendezvous over MPI" in events(run, "warning")[0]["message"]


def test_tcp_works_after_mpi_failed_in_the_same_run_directory(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_plan(2))
    assert [status for status, _ in meet(run, [0, 1], "--transport", "mpi")] == [75, 75]
    assert [status for status, _ in meet(run, [0, 1], "--transport", "tcp")] == [0, 0]
    assert len(events(run, "job-started")) == 1
    assert roster(run)["transport"] == "tcp"


@pytest.mark.parametrize("transport", ["tcp", "file"])
def test_a_missing_rank_is_named_within_the_bound(tmp_path: Path, transport: str) -> None:
    run = make_run(tmp_path / "run", make_plan(4))
    results = meet(
        run, [0, 1, 3], "--transport", transport, "--timeout", "3", SLURM_JOB_NODELIST="gpu[01-04]"
    )
    assert [status for status, _ in results] == [6, 6, 6], results
    for _, output in results:
        assert "1 of 4 ranks did not show up after 3 s: rank 2 (gpu03)" in output
    assert not run.roster.exists()
    status, output = finish(
        start(node_program("close", run, "--stage", "rendezvous", "--status", "6"), environment())
    )
    assert status == 0, output
    [failed] = events(run, "failed")
    assert failed["exit_code"] == 6
    assert "rank 2" in failed["message"]
    assert failed["hint"]


def test_a_missing_rank_is_named_while_mpi_waits_for_it(tmp_path: Path) -> None:
    # Two ranks start the rendezvous; the third sleeps inside the same MPI job.
    run = make_run(tmp_path / "run", make_plan(3))
    command = node_program("rendezvous", run, "--transport", "mpi", "--timeout", "4")
    process = start(
        [
            *("timeout", "--kill-after=5", "40"),
            str(MPIRUN),
            "--allow-run-as-root",
            "--oversubscribe",
            "-n",
            "2",
            *command,
            ":",
            "-n",
            "1",
            "sleep",
            "30",
        ],
        environment(),
    )
    status, output = finish(process, 60)
    assert status != 0
    assert "1 of 3 ranks did not show up after 4 s: rank 2" in output


def test_wrong_key_is_refused_and_told_on_both_sides(tmp_path: Path) -> None:
    good = make_run(tmp_path / "good", make_plan(2))
    bad = make_run(tmp_path / "bad", make_plan(2), job_key="another")
    # The stranger sees the same files but has another key.
    bad.ranks.rmdir()
    bad.ranks.symlink_to(good.ranks)
    host = start(node_program("rendezvous", good, "--transport", "tcp", "--timeout", "4"), environment(0))
    stranger = start(node_program("rendezvous", bad, "--transport", "tcp", "--timeout", "4"), environment(1))
    status, output = finish(stranger)
    assert status == 6
    assert "refused rank 1: wrong job key" in output
    status, output = finish(host)
    assert status == 6
    assert "refused 127.0.0.1: wrong job key" in output
    assert not good.roster.exists()
    assert "job-secret" not in output
    assert "another" not in output.replace("trying another", "")


@pytest.mark.parametrize("transport", ["tcp", "file"])
def test_files_of_an_earlier_start_are_not_believed(tmp_path: Path, transport: str) -> None:
    run = make_run(tmp_path / "run", make_plan(2))
    job = {"SLURM_JOB_ID": "7"}
    first = meet(run, [0, 1], "--transport", transport, **job)
    assert [status for status, _ in first] == [0, 0], first
    # Requeued: rank 1 alone must not take the old roster for the new one, nor rank 0 the old facts.
    for rank in (0, 1):
        [(status, output)] = meet(
            run, [rank], "--transport", transport, "--timeout", "2", SLURM_RESTART_COUNT=f"{rank + 1}", **job
        )
        assert status == 6, output
        assert f"rank {1 - rank}" in output
    again = meet(run, [0, 1], "--transport", transport, SLURM_RESTART_COUNT="3", **job)
    assert [status for status, _ in again] == [0, 0], again
    assert roster(run)["attempt"] == "7.3"


def test_a_rank_that_gives_up_ends_the_wait_at_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_plan(2))
    host = start(node_program("rendezvous", run, "--transport", "file", "--timeout", "50"), environment(0))
    wait_for(lambda: run.rank(0).exists(), "rank 0's start")
    (run.path / "rendezvous").mkdir(exist_ok=True)
    write_json(
        run.path / "rendezvous" / "gave-up-1.json",
        {
            "node": "n2",
            "attempt": "local.0",
            "transport": "file",
            "error": {"message": "n2 has no address", "hint": "name one", "exit_code": 6},
        },
    )
    status, output = finish(host, 30)
    assert status == 6
    assert "error: rank 1 (n2): n2 has no address" in output


def test_one_rank_without_mpi_sends_all_to_another_transport(tmp_path: Path) -> None:
    # Rank 0 waits inside MPI for a rank whose Python has no MPI: the step must end, and soon. `timeout` is
    # the job script's own guard: mpirun 5.0.11 at times fails by itself here (PMIX_ERR_UNREACH): it hangs
    # with its ranks gone (124; 137 when deaf to SIGTERM) or dies of SIGSEGV (139). The script goes on after
    # these as it does after 75, once all ranks came (tests/render/test_scripts_run.py).
    run = make_run(tmp_path / "run", make_plan(2))
    broken = tmp_path / "broken" / "mpi4py"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('no libmpi')")
    command = node_program("rendezvous", run, "--transport", "mpi", "--timeout", "60")
    process = start(
        [
            *("timeout", "--kill-after=5", "40"),
            str(MPIRUN),
            "--allow-run-as-root",
            "--oversubscribe",
            "-n",
            "1",
            *command,
            ":",
            "-n",
            "1",
            "env",
            f"PYTHONPATH={broken.parent}",
            *command,
        ],
        environment(),
    )
    status, output = finish(process)
    seen_by_the_script = status if status >= 0 else 128 - status
    assert seen_by_the_script == 75 or (seen_by_the_script > 8 and "PMIX ERROR" in output), output
    assert run.rank(0).exists() and run.rank(1).exists()
    assert "mpi4py can't load an MPI library" in output


def test_two_processes_with_one_rank_are_both_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_plan(3))
    results = meet(run, [0, 1, 1], "--transport", "tcp", "--timeout", "20")
    assert [status for status, _ in results] == [6, 6, 6], results
    assert "two processes say they are rank 1" in results[0][1]


def test_without_a_rank_the_variables_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", make_plan(1))
    for name in ("HPCSERVE_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMIX_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert main(["rendezvous", "--run-dir", str(run.path), "--transport", "file"]) == 6
    assert "HPCSERVE_RANK, SLURM_PROCID" in capfd.readouterr().err


def test_a_directory_without_a_plan_is_not_a_run_directory(tmp_path: Path) -> None:
    process = start(node_program("rendezvous", RunDir(tmp_path)), environment(0))
    status, output = finish(process)
    assert status == 8
    assert "is not a run directory" in output


def test_an_empty_key_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_plan(1))
    write_text(run.job_key, "")
    process = start(node_program("rendezvous", run, "--transport", "file"), environment(0))
    status, output = finish(process)
    assert status == 7
    assert "job-key is empty" in output


def test_a_missing_mpi_library_asks_for_another_transport(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_plan(2))
    broken = tmp_path / "broken" / "mpi4py"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libmpi.so.40: cannot open')")
    done = subprocess.run(
        node_program("rendezvous", run, "--transport", "mpi"),
        env=environment(0, PYTHONPATH=str(broken.parent)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 75
    assert "can't load an MPI library" in done.stderr
    assert "libmpi.so.40" in done.stderr


def test_512_ranks_meet_over_tcp(tmp_path: Path) -> None:
    status, _, verdicts = measure(tmp_path / "run", 512)
    assert status == 0
    assert verdicts == [None] * 511
    assert len(roster(RunDir(tmp_path / "run"))["ranks"]) == 512
