"""Job scripts, executed with stand-ins for srun, mpirun, apptainer and the in-job programs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hpcserve.config.model import ModelSpec
from hpcserve.config.site import SetupSite, Site
from hpcserve.node.preflight import coordinator, member
from hpcserve.plan.plan import BatchPlan
from hpcserve.plan.preflight import PREFLIGHT_TIMEOUT
from hpcserve.render.script import render_script
from hpcserve.rundir.events import read_events

from .cases import aggregated, contained, dgx, local, mixed, pair, plan
from .job import Job

SERVES = {"agent": "terms 1 0", "head": "after 1 0"}


def job(
    root: Path, programs: dict[str, str], *, site: Site | None = None, run_dir: str = "run", nodes: int = 2
) -> Job:
    directory = root / run_dir
    text = render_script(plan(site or dgx(), model=pair(), nodes=nodes), directory, python="python")
    return Job(root, text, directory, programs)


def test_rendezvous_then_agents_then_head(tmp_path: Path) -> None:
    done = job(tmp_path, SERVES).run()
    assert done.status == 0, done.errors
    assert done.programs[:3] == ["mpi-list", "rendezvous-mpi", "preflight"]
    assert sorted(done.programs[3:]) == ["agent", "close", "head"]
    met = done.call("rendezvous-mpi").argv
    assert {"--mpi=pmix", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0"} <= set(
        met
    )
    agent = done.call("agent").argv
    assert {"--no-kill", "--kill-on-bad-exit=0", "--wait=0", "--mpi=none", "--cpu-bind=none"} <= set(agent)
    head = done.call("head")
    assert (head.name, head.argv) == (
        "python",
        ["-m", "hpcserve.node", "head", "--run-dir", str(tmp_path / "run")],
    )


def test_a_heterogeneous_job_logs_by_rank_and_goes_on_without_mpi(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    text = render_script(mixed(), directory, python="python")
    # MPI dies before a rank begins, as it does with PMIx of Slurm 22.05.
    programs = {**SERVES, "rendezvous-mpi": "exit 137"}
    done = Job(tmp_path, text, directory, programs).run(SLURM_PROCID="1")
    assert done.status == 0, done.errors
    assert "warning: MPI ended with status 137" in done.errors
    assert [name for name in done.programs if name.startswith("rendezvous")] == [
        "rendezvous-mpi",
        "rendezvous-tcp",
    ]
    for program in ("rendezvous-tcp", "agent"):
        argv = done.call(program).argv
        assert "--het-group=0-1" in argv and "--ntasks-per-node=1" in argv
        assert not any(word.startswith(("--nodes", "--ntasks=", "--output")) for word in argv)
        wrapped = argv[argv.index("bash") :]
        log = str(directory / "logs" / program.removesuffix("-tcp"))
        assert wrapped[1] == "-c" and wrapped[3:5] == ["bash", log]


def test_agents_are_told_to_end_when_the_head_has_ended(tmp_path: Path) -> None:
    done = job(tmp_path, SERVES).run()
    assert done.lines("signals") == ["agent USR1"]
    assert done.left_over() == []


def test_agents_that_are_deaf_are_killed(tmp_path: Path) -> None:
    stuck = job(tmp_path, {"agent": "deaf", "head": "after 1 0"})
    text = stuck.script.read_text()
    assert "\nkill_wait=30\n" in text
    stuck.script.write_text(text.replace("\nkill_wait=30\n", "\nkill_wait=1\n"))
    stuck.run()
    assert stuck.status == 0
    assert "are killed" in stuck.errors
    assert stuck.left_over() == []


@pytest.mark.parametrize("status", [1, 6, 7])
def test_the_heads_exit_status_is_the_jobs(tmp_path: Path, status: int) -> None:
    done = job(tmp_path, SERVES | {"head": f"after 1 {status}"}).run()
    assert done.status == status
    assert f"the head process ended with status {status}" in done.errors
    assert done.left_over() == []


def test_mpi_that_can_not_be_used_falls_back_to_tcp_and_says_so(tmp_path: Path) -> None:
    done = job(tmp_path, SERVES | {"rendezvous-mpi": "exit 75"}).run()
    assert done.status == 0
    assert done.programs[:3] == ["mpi-list", "rendezvous-mpi", "rendezvous-tcp"]
    assert "--mpi=none" in done.call("rendezvous-tcp").argv
    assert "warning: the rendezvous can't use mpi here" in done.errors


def test_the_last_transport_is_the_shared_file_system(tmp_path: Path) -> None:
    done = job(tmp_path, SERVES | {"rendezvous-mpi": "exit 75", "rendezvous-tcp": "exit 75"}).run()
    assert done.status == 0
    assert "rendezvous-file" in done.programs
    assert done.errors.count("warning: ") == 2


def test_no_transport_at_all_fails_the_job(tmp_path: Path) -> None:
    none = {f"rendezvous-{transport}": "exit 75" for transport in ("mpi", "tcp", "file")}
    done = job(tmp_path, SERVES | none).run()
    assert done.status == 6
    assert "agent" not in done.programs and "head" not in done.programs


def test_a_failed_rendezvous_is_not_tried_again_another_way(tmp_path: Path) -> None:
    done = job(tmp_path, SERVES | {"rendezvous-mpi": "exit 6"}).run()
    assert done.status == 6
    assert done.programs == ["mpi-list", "rendezvous-mpi", "close"]
    assert "the rendezvous failed with status 6" in done.errors


@pytest.mark.parametrize("status", [14, 137, 139, 143])
def test_mpi_that_dies_after_all_ranks_came_falls_back_to_tcp(tmp_path: Path, status: int) -> None:
    done = job(tmp_path, SERVES | {"rendezvous-mpi": f"joins 2 {status}"}).run()
    assert done.status == 0
    assert done.programs[:3] == ["mpi-list", "rendezvous-mpi", "rendezvous-tcp"]
    assert f"warning: MPI ended with status {status}" in done.errors


def test_mpi_that_dies_before_all_ranks_came_fails_the_job(tmp_path: Path) -> None:
    done = job(tmp_path, SERVES | {"rendezvous-mpi": "joins 1 140"}).run()
    assert done.status == 140
    assert "rendezvous-tcp" not in done.programs


def test_a_missing_mpi_plugin_is_named_and_tcp_used(tmp_path: Path) -> None:
    done = job(tmp_path, SERVES | {"mpi-list": "say pmi2"}).run()
    assert done.status == 0
    assert done.programs[:2] == ["mpi-list", "rendezvous-tcp"]
    assert 'no MPI plugin "pmix"' in done.errors
    assert "hint: correct slurm.mpi" in done.errors


def test_a_site_without_mpi_begins_with_tcp(tmp_path: Path) -> None:
    done = job(tmp_path, SERVES, site=dgx(mpi="none")).run()
    assert done.status == 0
    assert done.programs[0] == "rendezvous-tcp"
    assert done.errors == ""


def test_term_drains_by_way_of_the_head(tmp_path: Path) -> None:
    running = job(tmp_path, {"agent": "terms 1 0", "head": "terms 1 0"}).start()
    running.until_up("agent", "head")
    running.term()
    assert running.wait() == 0
    assert running.lines("signals") == ["head TERM", "agent USR1"]
    assert running.left_over() == []


def test_a_second_term_reaches_the_head_too(tmp_path: Path) -> None:
    running = job(tmp_path, {"agent": "terms 1 0", "head": "terms 2 5"}).start()
    running.until_up("agent", "head")
    running.term()
    running.until(lambda: running.lines("signals") == ["head TERM"])
    running.term()
    assert running.wait() == 5
    assert running.lines("signals") == ["head TERM", "head TERM", "agent USR1"]


def test_a_preflight_that_finds_no_way_ends_the_job_before_any_engine(tmp_path: Path) -> None:
    done = job(tmp_path, SERVES | {"preflight": "exit 6"}).run()
    assert done.status == 6
    assert done.programs == ["mpi-list", "rendezvous-mpi", "preflight", "close"]
    assert done.call("close").argv[-4:] == ["--stage", "preflight", "--status", "6"]


@pytest.mark.parametrize("status", [1, 137, 143])
def test_a_preflight_that_dies_is_told_and_the_job_goes_on(tmp_path: Path, status: int) -> None:
    done = job(tmp_path, SERVES | {"preflight": f"exit {status}"}).run()
    assert done.status == 0
    assert f"warning: the preflight ended with status {status}" in done.errors
    assert {"--no-kill", "--kill-on-bad-exit=0", "--mpi=none"} <= set(done.call("preflight").argv)


@pytest.mark.parametrize("status", [6, 137])
def test_the_preflights_verdict_is_rank_0s_whatever_became_of_other_tasks(
    tmp_path: Path, status: int
) -> None:
    """Slurm's status is 137 where a late task was killed, and 0 or 1 where that of another is worse."""
    done = job(tmp_path, SERVES | {"preflight": f"finds 6 {status}"}).run()
    assert done.status == 6
    assert done.programs == ["mpi-list", "rendezvous-mpi", "preflight", "close"]


def test_a_preflight_that_found_nothing_wrong_is_no_warning_whatever_became_of_other_tasks(
    tmp_path: Path,
) -> None:
    done = job(tmp_path, SERVES | {"preflight": "finds 0 137"}).run()
    assert done.status == 0
    assert "the preflight ended" not in done.errors


def test_a_verdict_of_an_earlier_start_is_not_believed(tmp_path: Path) -> None:
    again = job(tmp_path, SERVES | {"preflight": "exit 137"})
    (again.run_dir / "rendezvous").mkdir(parents=True)
    (again.run_dir / "rendezvous" / "preflight-over").write_text("1.0 6\n")
    again.run()
    assert again.status == 0
    assert "warning: the preflight ended with status 137" in again.errors


def test_once_rank_0_is_done_a_node_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    text = render_script(plan(dgx(), model=pair(), nodes=2), directory, python="python")
    # The half minute that others have is none here.
    patient = 'within 30 "${running[@]}"'
    assert text.count(patient) == 1
    text = text.replace(patient, patient.replace("30", "0"))
    done = Job(tmp_path, text, directory, SERVES | {"preflight": "finds 0 hangs"}).run()
    assert done.status == 0
    assert "did not end in 30 s: it is killed" in done.errors
    assert "head" in done.programs


def test_slurm_does_not_kill_rank_0_because_another_task_has_ended(tmp_path: Path) -> None:
    """--wait counts from the first task to end, whichever that is (_setup_max_wait_timer of Slurm's srun)."""
    [wait] = [
        word for word in job(tmp_path, SERVES).run().call("preflight").argv if word.startswith("--wait=")
    ]
    assert int(wait.removeprefix("--wait=")) > coordinator.JOIN + member.START + coordinator.HARD_LIMIT
    assert int(wait.removeprefix("--wait=")) > PREFLIGHT_TIMEOUT


def test_what_the_preflight_says_is_in_the_jobs_log(tmp_path: Path) -> None:
    told = job(tmp_path, SERVES)
    (told.run_dir / "logs").mkdir(exist_ok=True)
    (told.run_dir / "logs" / "preflight-0.log").write_text("KV preflight: 1 pair\n")  # srun is a stand-in
    told.run()
    assert told.status == 0
    assert "KV preflight: 1 pair\n" in told.errors


def test_term_during_the_preflight_ends_it_and_the_job(tmp_path: Path) -> None:
    running = job(tmp_path, SERVES | {"preflight": "terms 1 143"}).start()
    running.until_up("preflight")
    running.term()
    assert running.wait() == 143
    assert running.programs == ["mpi-list", "rendezvous-mpi", "preflight", "close"]
    assert running.call("close").argv[-5:] == ["--stage", "preflight", "--status", "143", "--signalled"]
    assert running.left_over() == []


@pytest.mark.parametrize(
    ("site", "model"),
    [
        (dgx(), pair(kv_preflight=False)),
        (dgx(), pair(engine="fake")),
        (dgx(), aggregated()),
        (local(), pair()),
    ],
    ids=["model.yaml says no", "no NIXL", "one pool", "one machine"],
)
def test_no_preflight_where_no_kv_crosses_a_link(tmp_path: Path, site: Site, model: ModelSpec) -> None:
    script = render_script(plan(site, model=model, nodes=2), tmp_path, python="python")
    assert "hpcserve.node preflight" not in script


def test_term_during_the_rendezvous_starts_nothing_more(tmp_path: Path) -> None:
    running = job(tmp_path, SERVES | {"rendezvous-mpi": "terms 1 75"}).start()
    running.until_up("rendezvous-mpi")
    running.term()
    assert running.wait() == 143
    assert running.programs == ["mpi-list", "rendezvous-mpi", "close"]
    assert running.left_over() == []


def events(root: Path) -> list[dict[str, object]]:
    return [event for event, _ in read_events(root / "run" / "events.jsonl")]


def test_a_job_that_ends_without_a_word_is_told_how_far_it_came(tmp_path: Path) -> None:
    aborted = job(tmp_path, SERVES | {"rendezvous-mpi": "exit 140"}).run()
    assert aborted.status == 140
    assert aborted.call("close").argv[-4:] == ["--stage", "rendezvous", "--status", "140"]
    assert aborted.programs[-1] == "close"


def test_a_job_told_to_end_before_it_served_says_so(tmp_path: Path) -> None:
    running = job(tmp_path, SERVES | {"rendezvous-mpi": "terms 1 75"}).start()
    running.until_up("rendezvous-mpi")
    running.term()
    running.wait()
    assert running.call("close").argv[-5:] == ["--stage", "rendezvous", "--status", "143", "--signalled"]


def test_the_last_event_is_written_without_python_too(tmp_path: Path) -> None:
    broken = job(tmp_path, {"rendezvous-mpi": "exit 127", "close": "exit 127"}).run()
    assert broken.status == 127
    [failed] = events(tmp_path)
    assert (failed["event"], failed["exit_code"]) == ("failed", 127)
    assert failed["message"] == "the job ended with status 127 in its stage 'rendezvous'"


def test_an_end_that_was_told_is_not_told_twice(tmp_path: Path) -> None:
    told = job(tmp_path, SERVES | {"head": "after 1 6"})
    text = told.script.read_text()
    event = '{"t": 1, "event": "failed", "message": "m", "hint": "h", "exit_code": 6}'
    assert 'await "$head"\n' in text
    line = f"echo '{event}' >>\"$HPCSERVE_RUN_DIR/events.jsonl\"\n"
    told.script.write_text(text.replace('await "$head"\n', line + 'await "$head"\n'))
    (told.run_dir / "events.jsonl").write_text(event + "\n")  # of an earlier attempt
    told.run()
    assert told.status == 6
    assert "close" not in told.programs
    assert len(events(tmp_path)) == 2


def test_a_run_asked_to_stop_does_not_come_back(tmp_path: Path) -> None:
    stopped = job(tmp_path, SERVES)
    (stopped.run_dir / "stop").touch()
    stopped.run()
    assert stopped.status == 0
    assert stopped.programs == ["close"]
    assert stopped.call("close").argv[-4:] == ["--stage", "stop-file", "--status", "0"]


@pytest.mark.parametrize("run_dir", ["run", "it's 100% $HOME `x` *"])
def test_files_of_an_earlier_start_are_gone_before_the_rendezvous(tmp_path: Path, run_dir: str) -> None:
    again = job(tmp_path, SERVES, run_dir=run_dir)
    (again.run_dir / "ranks").mkdir()
    (again.run_dir / "rendezvous").mkdir()
    stale = ["ranks/1.json", "rendezvous/1.json", "roster.json", "head.json", "endpoint.json"]
    for name in (*stale, "plan.json", "events.jsonl"):
        (again.run_dir / name).touch()
    assert again.run().status == 0, again.errors
    assert [name for name in stale if (again.run_dir / name).exists()] == []
    assert (again.run_dir / "plan.json").exists()


def test_srun_hands_usr1_to_a_head_in_a_pyxis_container(tmp_path: Path) -> None:
    # TERM would make srun kill the head, without any drain.
    running = job(
        tmp_path, {"agent": "terms 1 0", "head": "terms 1 0"}, site=contained(dgx(), "pyxis")
    ).start()
    running.until_up("agent", "head")
    running.term()
    assert running.wait() == 0
    assert running.lines("signals") == ["head USR1", "agent USR1"]


def test_without_agents_the_head_is_stopped(tmp_path: Path) -> None:
    lost = job(tmp_path, {"agent": "exit 1", "head": "terms 1 6"})
    text = lost.script.read_text()
    assert "within 30 " in text
    lost.script.write_text(text.replace("within 30 ", "within 1 "))
    lost.run()
    assert lost.status == 6
    assert "all agents are gone" in lost.errors
    assert lost.lines("signals") == ["head TERM"]


def test_a_run_directory_with_odd_characters(tmp_path: Path) -> None:
    done = job(tmp_path, SERVES, run_dir="it's 100%t $HOME `x`").run()
    assert done.status == 0, done.errors
    assert done.call("head").argv[-1] == str(tmp_path / "it's 100%t $HOME `x`")
    (output,) = [word for word in done.call("agent").argv if word.startswith("--output=")]
    assert output == f"--output={tmp_path}/it's 100%%t $HOME `x`/logs/agent-%t.log"


def test_pyxis_puts_every_program_into_the_container(tmp_path: Path) -> None:
    done = job(tmp_path, SERVES, site=contained(dgx(), "pyxis")).run(SLURM_JOB_END_TIME="1")
    assert done.status == 0, done.errors
    for program in ("rendezvous-mpi", "agent", "head"):
        call = done.call(program)
        assert call.name == "srun"
        assert "--container-image=/images/hpcserve.sqsh" in call.argv
        mounts = "--container-mounts=/tmp:/tmp,/models/llama:/models/llama:ro"
        assert mounts in call.argv
    assert {"--overlap", "--nodelist=n1", "--nodes=1", "--ntasks=1", "--gres=none"} <= set(
        done.call("head").argv
    )
    assert "squeue" not in done.programs


def test_a_container_without_squeue_gets_the_end_of_the_job(tmp_path: Path) -> None:
    site = contained(dgx(), "pyxis")
    asked = job(tmp_path, SERVES | {"squeue": "say 2026-11-21T03:00:00"}, site=site).run()
    assert asked.programs[0] == "squeue"
    assert asked.errors == ""
    unknown = job(tmp_path / "2", SERVES | {"squeue": "exit 1"}, site=site).run()
    assert "squeue does not say when this job ends" in unknown.errors
    assert unknown.status == 0


@pytest.mark.parametrize("program", ["apptainer", "singularity"])
def test_apptainer_sees_the_directory_of_pmix(tmp_path: Path, program: str) -> None:
    behaviour = {"rendezvous-mpi": "run bash /run/pmix", "rendezvous-tcp": "exit 0"}
    steps = job(tmp_path, SERVES | behaviour, site=contained(dgx(), "apptainer"))
    # The stand-in for apptainer ends with the status that sends the script to TCP.
    (steps.bin / "apptainer").unlink()
    (steps.bin / program).write_text(
        f'#!/bin/bash\necho "${{0##*/}} $APPTAINER_BIND $*" >>"{steps.stubs}/inside"\nexit 75\n'
    )
    (steps.bin / program).chmod(0o755)
    steps.run(SLURM_JOB_END_TIME="1", APPTAINER_BIND="/data")
    inside = steps.lines("inside")
    assert inside[0].startswith(f"{program} /data exec --bind=/run/pmix --nv ")
    assert inside[0].endswith(f"-m hpcserve.node rendezvous --run-dir {tmp_path}/run --transport mpi")
    assert "warning: the rendezvous can't use mpi here" in steps.errors


def test_without_a_container_runtime_the_job_says_so(tmp_path: Path) -> None:
    bare = job(tmp_path, SERVES, site=contained(dgx(), "apptainer"))
    (bare.bin / "apptainer").unlink()
    bare.run(SLURM_JOB_END_TIME="1")
    assert bare.status == 3
    assert "error: there is neither apptainer nor singularity on" in bare.errors
    assert "hint: load its module" in bare.errors
    assert "agent" not in bare.programs


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_the_nodes_own_libraries_stay_outside(tmp_path: Path, runtime: str) -> None:
    site = replace(contained(dgx(), runtime), setup=SetupSite(env={"PYTHONPATH": "/meant"}))
    inside = job(tmp_path, SERVES, site=site)
    seen = inside.stubs / "seen"
    text = inside.script.read_text()
    report = f'echo "${{PYTHONPATH:-}} ${{PYTHONHOME:-}} ${{VIRTUAL_ENV:-}}" >>{seen}\n'
    inside.script.write_text(text.replace("\nstage=rendezvous\n", f"\nstage=rendezvous\n{report}"))
    inside.run(SLURM_JOB_END_TIME="1", PYTHONPATH="/node", PYTHONHOME="/node", VIRTUAL_ENV="/node")
    assert seen.read_text().split() == ["/meant"]


def test_with_the_agent_outside_nothing_of_ours_runs_in_the_container(tmp_path: Path) -> None:
    site = contained(dgx(), "apptainer")
    done = job(tmp_path, SERVES, site=replace(site, container=replace(site.container, agent="outside"))).run()
    assert done.status == 0, done.errors
    assert {call.name for call in done.calls} <= {"srun", "python"}


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_a_batch_is_looked_at_inside(tmp_path: Path, runtime: str) -> None:
    made = plan(contained(dgx(), runtime), model=pair(), nodes=2)
    made = replace(made, batch=BatchPlan(output="/out/b", max_error_rate=0.1))
    text = render_script(made, tmp_path / "run", python="python")
    done = Job(tmp_path, text, tmp_path / "run", {}).run(SLURM_JOB_END_TIME="1")
    [call] = [call for call in done.calls if "hpcserve.batch" in call.argv]
    assert call.name == ("srun" if runtime == "pyxis" else "apptainer")
    assert any("/out/b:/out/b" in word for word in call.argv)


def test_local_starts_one_agent_per_rank(tmp_path: Path) -> None:
    done = job(tmp_path, SERVES | {"head": "after 3 0"}, site=local(), nodes=3).run()
    assert done.status == 0, done.errors
    met = done.call("rendezvous-mpi")
    assert met.name == "mpirun"
    assert met.argv[:6] == ["--host", "localhost:3", "--bind-to", "none", "-n", "3"]
    agents = [call for call in done.calls if call.program == "agent"]
    assert sorted(call.rank for call in agents) == ["0", "1", "2"]
    assert done.lines("signals") == ["agent TERM"] * 3
    assert done.left_over() == []


def test_local_without_mpirun_meets_over_tcp(tmp_path: Path) -> None:
    alone = job(tmp_path, SERVES | {"head": "after 2 0"}, site=local(), nodes=2)
    (alone.bin / "mpirun").unlink()
    alone.run()
    assert alone.status == 0
    assert "there is no mpirun beside python" in alone.errors
    tcp = [call for call in alone.calls if call.program == "rendezvous-tcp"]
    assert sorted(call.rank for call in tcp) == ["0", "1"]


def test_local_ends_an_mpirun_that_hangs_and_meets_over_tcp(tmp_path: Path) -> None:
    hanging = job(tmp_path, SERVES | {"rendezvous-mpi": "joins 2 hangs", "head": "after 2 0"}, site=local())
    text = hanging.script.read_text()
    assert "timeout --kill-after=5 150 " in text
    hanging.script.write_text(text.replace("timeout --kill-after=5 150 ", "timeout --kill-after=5 1 "))
    hanging.run()
    assert hanging.status == 0, hanging.errors
    assert "MPI ended with status 124 after all ranks had come" in hanging.errors
    assert hanging.programs[:3] == ["rendezvous-mpi", "rendezvous-tcp", "rendezvous-tcp"]


def test_local_reports_the_status_of_the_rank_that_failed(tmp_path: Path) -> None:
    failed = job(
        tmp_path, SERVES | {"rendezvous-mpi": "exit 75", "rendezvous-tcp": "exit 6"}, site=local()
    ).run()
    assert failed.status == 6
    assert "agent" not in failed.programs


def test_local_term_reaches_the_head(tmp_path: Path) -> None:
    running = job(tmp_path, {"agent": "terms 1 0", "head": "terms 1 0"}, site=local()).start()
    running.until_up("agent", "head")
    running.term()
    assert running.wait() == 0
    assert running.lines("signals")[0] == "head TERM"
    assert running.left_over() == []


def test_a_failing_module_ends_the_job_before_anything_starts(tmp_path: Path) -> None:
    site = dgx()
    site = replace(site, setup=replace(site.setup, modules=("cuda/12.8",), script="module() { return 1; }"))
    text = render_script(plan(site, model=aggregated()), tmp_path / "run", python="python")
    failing = Job(tmp_path, "module() { return 1; }\n" + text, tmp_path / "run", SERVES).run()
    assert failing.status == 3
    assert failing.programs == []
    [failed] = events(tmp_path)
    assert failed["message"] == "the job ended with status 3 in its stage 'setup'"
