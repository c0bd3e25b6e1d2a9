from __future__ import annotations

import json
import os
import stat
import subprocess

import pytest

from hpcserve.cli import live
from hpcserve.cli.ladder import Progress

from .conftest import World
from .jobs import becomes_ready, writes, writes_events

RUNNING = "42|RUNNING|1790000000|1990003600|n[1-4]|None"
LAUNCH = ("launch", "--nodes", "4", "model.yaml")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_GLANCE", 0.01)
    monkeypatch.setattr(live, "_LAST_WORDS", 0.05)


def test_a_dry_run_prints_plan_script_and_commands_and_touches_nothing(world: World) -> None:
    answer = world(*LAUNCH, "--dry-run")
    assert answer.status == 0
    assert "2         TP1" in answer.out
    assert "#SBATCH --nodes=4" in answer.out
    assert answer.out.count("hpcserve.engines.fake_server") == 4
    assert world.files() == set()
    assert not world.runs.exists()
    assert world.slurm.calls() == []


def test_the_dry_run_is_the_truth(world: World) -> None:
    """Dry run, --output-script, render, and the submitted run directory hold the same bytes."""
    printed = world(*LAUNCH, "--dry-run").out
    rendered = world("render", "--nodes", "4", "model.yaml").out
    assert world(*LAUNCH, "--output-script", "out/deep").status == 0
    assert world(*LAUNCH, "--no-wait").status == 0
    run = world.runs / "tiny"
    for name in ("job.sh", "engines.sh", "plan.json"):
        text = (run / name).read_text()
        assert (world.home / "out/deep" / name).read_text() == text
        assert name == "plan.json" or text in printed
    assert rendered == (run / "job.sh").read_text()


def test_the_json_of_a_dry_run_has_the_files_and_a_schema_version(world: World) -> None:
    document = json.loads(world(*LAUNCH, "--dry-run", "--json").out)
    assert document["schema_version"] == 1
    assert set(document["files"]) == {"job.sh", "engines.sh", "plan.json"}
    assert document["plan"]["nodes"] == 4


def test_engine_commands_are_valid_shell(world: World) -> None:
    world(*LAUNCH, "--output-script", "out")
    for name in ("engines.sh", "job.sh"):
        subprocess.run(["bash", "-n", world.home / "out" / name], check=True)


def test_output_script_that_can_not_be_written_leaves_nothing(world: World) -> None:
    (world.home / "file").write_text("")
    answer = world(*LAUNCH, "--output-script", "file/out")
    assert answer.status == 7
    assert world.files() == {"file"}


def test_the_cost_is_said_before_the_job_is_submitted(world: World) -> None:
    world.site("mine", "name: mine\nnode: {gpus: 8}\ngpu_hour_rate: 2.5\n")
    world.model.write_text("model: org/tiny\nprefill: {tensor_parallel: 8}\ndecode: {tensor_parallel: 8}\n")
    world.slurm.refuses("no")
    answer = world("launch", "--site", "mine", "--nodes", "2", "--walltime", "02:00:00", "model.yaml")
    cost, error = answer.err.splitlines()[0], answer.err.splitlines()[1]
    assert "2 nodes × 8 GPUs × 02:00:00 = 32.0 GPU-hours" in cost
    assert "80.0 units" in cost
    assert error.startswith("error:")


def test_a_run_directory_is_private_and_so_are_its_keys(world: World) -> None:
    assert world(*LAUNCH, "--no-wait").status == 0
    run = world.runs / "tiny"
    for path in (run, run / "secrets", run / "logs", run / "ranks"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in (run / "secrets/api-key", run / "secrets/job-key", run / "plan.json", run / "run.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keys = [(run / "secrets" / name).read_text().strip() for name in ("api-key", "job-key")]
    assert keys[0].startswith("hs-")
    assert keys[0] != keys[1]
    everything = "".join(
        path.read_text() for path in run.rglob("*") if path.is_file() and path.parent.name != "secrets"
    )
    assert not any(key in everything for key in keys)
    assert not any(key in call for key in keys for call in world.slurm.calls())
    assert not any(key in value for key in keys for value in world.slurm.environment_of("sbatch").values())


def test_a_named_group_may_read_the_key_but_not_the_job_key(world: World) -> None:
    import grp

    world.model.write_text(world.model.read_text() + f"group: {grp.getgrgid(os.getegid()).gr_name}\n")
    assert world(*LAUNCH, "--no-wait").status == 0
    run = world.runs / "tiny"
    assert stat.S_IMODE(run.stat().st_mode) == 0o2750
    assert stat.S_IMODE((run / "secrets/api-key").stat().st_mode) == 0o640
    assert stat.S_IMODE((run / "secrets/job-key").stat().st_mode) == 0o600
    assert run.stat().st_gid == os.getegid()


def test_without_auth_there_is_no_api_key(world: World) -> None:
    world(*LAUNCH, "--no-wait", "--set", "router.auth=false")
    assert sorted(path.name for path in (world.runs / "tiny/secrets").iterdir()) == ["job-key"]


def test_run_json_says_who_submitted_what_and_when(world: World) -> None:
    world(*LAUNCH, "--no-wait", "--name", "eval")
    record = json.loads((world.runs / "eval/run.json").read_text())
    assert record["job_id"] == "42"
    assert record["run_id"] == record["name"] == "eval"
    assert record["scheduler"] == "slurm"
    assert record["site"] == "test-cluster"
    assert record["command"] == ["hpcserve", *LAUNCH, "--no-wait", "--name", "eval"]


def test_a_second_run_of_the_same_name_gets_one_of_its_own(world: World) -> None:
    world(*LAUNCH, "--no-wait", "--name", "eval")
    answer = world(*LAUNCH, "--no-wait", "--name", "eval")
    names = sorted(path.name for path in world.runs.iterdir())
    assert len(names) == 2
    assert names[1].startswith("eval-")
    assert f"submitted {names[1]}" in answer.err


def test_the_way_to_ready_ends_with_a_block_to_copy(world: World) -> None:
    world.slurm.runs(becomes_ready())
    world.slurm.shows(RUNNING)
    answer = world(*LAUNCH)
    assert answer.status == 0
    rungs = [line.split(maxsplit=3)[2:] for line in answer.err.splitlines() if "✓" in line]
    assert len(rungs) == 7
    assert "warning: KV blocks cross TCP" in answer.err
    for text in ("READY", "http://127.0.0.1:20000/v1", "ssh -N -L", "curl", "OpenAI(", "hpcserve stop tiny"):
        assert text in answer.out
    assert "READY after" not in answer.err


def test_ready_as_json(world: World) -> None:
    world.slurm.runs(becomes_ready())
    world.slurm.shows(RUNNING)
    document = json.loads(world(*LAUNCH, "--json").out)
    assert document["state"] == "ready"
    assert document["endpoint"]["url"] == "http://127.0.0.1:20000/v1"


def test_a_failed_job_ends_with_its_own_last_word(world: World) -> None:
    world.slurm.runs(
        writes_events(
            {"event": "job-started", "node": "n1"},
            {"event": "failed", "message": "rank 3 (n4) never joined", "hint": "is n4 up?", "exit_code": 6},
        )
    )
    world.slurm.shows(RUNNING)
    answer = world(*LAUNCH)
    assert answer.status == 6
    assert "error: rank 3 (n4) never joined" in answer.err
    assert "hint: is n4 up?" in answer.err


def test_a_job_that_dies_silently_shows_slurms_word_and_the_lines_that_matter(world: World) -> None:
    world.slurm.runs(
        writes("logs/job.log", "starting\nslurmstepd: error: Detected 1 oom_kill event in StepId=42.1\n")
        + writes("logs/decode-0.n3.log", "loading weights\nall is well\n")
    )
    world.slurm.shows("42|OUT_OF_MEMORY|1790000000|1790000100|n[1-4]|OutOfMemory")
    answer = world(*LAUNCH)
    assert answer.status == 6
    assert "killed: out of memory" in answer.err
    assert "job: slurmstepd: error: Detected 1 oom_kill" in answer.err
    assert "all is well" not in answer.err


def test_a_controller_that_is_down_does_not_end_the_wait(world: World) -> None:
    world.slurm.runs(becomes_ready())
    world.slurm.says("squeue", "", error="error: Unable to contact slurm controller\n", status=1)
    answer = world(*LAUNCH)
    assert answer.status == 0
    assert "Unable to contact slurm controller" in answer.err
    assert "the job is not affected" in answer.err


def test_ctrl_c_leaves_the_job_running_and_says_how_to_get_back(world: World) -> None:
    shown = live.Lines.show

    def show_then_interrupt(view: live.Lines, progress: Progress, now: float) -> None:
        shown(view, progress, now)
        raise KeyboardInterrupt

    world.slurm.shows("42|PENDING|N/A|N/A||Priority")
    world.monkeypatch.setattr(live.Lines, "show", show_then_interrupt)
    answer = world(*LAUNCH)
    assert answer.status == 130
    assert "jobs with a higher priority come first" in answer.err
    assert "`hpcserve status tiny`" in answer.err
    assert "`hpcserve stop tiny`" in answer.err
    assert world.slurm.calls("scancel") == []
    assert (world.runs / "tiny/run.json").exists()


def test_variables_that_sbatch_would_obey_are_named_as_unused(world: World) -> None:
    world.monkeypatch.setenv("SBATCH_PARTITION", "debug")
    answer = world(*LAUNCH, "--no-wait")
    assert "warning: SBATCH_PARTITION=debug" in answer.err
    assert "SBATCH_PARTITION" not in world.slurm.environment_of("sbatch")


def test_a_model_path_is_made_absolute_for_the_nodes(world: World) -> None:
    (world.home / "m").mkdir()
    (world.home / "m/config.json").write_text("{}")
    world.model.write_text("model: ./m\nengine: fake\ndevice: cpu\n")
    document = json.loads(world(*LAUNCH, "--dry-run", "--json").out)
    assert document["plan"]["model"]["model"] == str(world.home / "m")


SHARED = """
model: org/tiny
engine: vllm
device: cpu
kv_offload: {cpu_gib: 1, shared_gib: 0.01}
"""


def test_the_directory_of_kv_blocks_is_made_when_the_job_is_submitted(world: World) -> None:
    world.site("mine", "extends: test-cluster\nstorage: {kv: ~/scratch/kv}\n")
    world.model.write_text(SHARED)
    launch = (*LAUNCH, "--site", "mine")
    document = json.loads(world(*launch, "--dry-run", "--json").out)
    directory = world.home / "scratch/kv"
    assert document["plan"]["site"]["storage"]["kv"] == str(directory)
    assert not directory.exists()
    assert world(*launch, "--no-wait").status == 0
    assert directory.stat().st_mode & 0o777 == 0o700
    world.model.write_text(SHARED.replace("0.01", "1e9"))
    refused = world(*launch, "--no-wait")
    assert refused.status != 0
    assert f"kv_offload.shared_gib is 1e+09, but {directory} has room for" in refused.err
    world.model.write_text(SHARED)
    directory.chmod(0o755)
    refused = world(*launch, "--no-wait")
    assert "mode 0700" in refused.err and "chmod 700" in refused.err


def test_a_directory_of_kv_blocks_that_no_variable_names(world: World) -> None:
    world.site("mine", "extends: test-cluster\nstorage: {kv: $NOWHERE/kv}\n")
    world.model.write_text(SHARED)
    refused = world(*LAUNCH, "--site", "mine", "--dry-run")
    assert refused.status != 0
    assert "`storage.kv` of site mine: '$NOWHERE/kv' is not an absolute path" in refused.err


@pytest.mark.parametrize(("decode", "told"), [(3, True), (2, False)])
def test_a_segment_that_cannot_be_kept_is_told(world: World, decode: int, told: bool) -> None:
    world.site(
        "mine",
        "extends: test-cluster\nslurm: {segment: true, max_nodes: 8}\nnode: {nvlink_domain_nodes: 2}\n",
    )
    world.model.write_text(
        "model: org/tiny\nengine: vllm\ndevice: cpu\nprefill: {nodes: 2, tensor_parallel: 2}\n"
        f"decode: {{nodes: {decode}, data_parallel: {decode}}}\n"
    )
    answer = world("launch", f"--nodes={2 + decode}", "--site=mine", "--no-wait", "model.yaml")
    assert answer.status == 0, answer.err
    assert ("warning: `slurm.segment` can't be kept: no division of 5 nodes" in answer.err) == told
    [script] = world.runs.glob("*/job.sh")
    assert ("--segment=2" in script.read_text()) != told


def test_output_has_no_colour_codes_off_a_terminal(world: World) -> None:
    assert "\x1b" not in world("lunch").err


def test_debug_shows_where_an_error_came_from(world: World) -> None:
    from hpcserve.errors import PlanError

    with pytest.raises(PlanError):
        world(*LAUNCH, "--debug", "--prefill", "9")
