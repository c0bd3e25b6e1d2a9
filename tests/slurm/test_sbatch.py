from __future__ import annotations

from pathlib import Path

import pytest

from hpcserve.errors import SlurmDown, SlurmError
from hpcserve.slurm.sbatch import SlurmScheduler, overriding_variables

from .fake_slurm import FakeSlurm


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", fake.path)
    return fake


def scheduler(fake: FakeSlurm, timeout: float = 20.0, **variables: str) -> SlurmScheduler:
    return SlurmScheduler(timeout=timeout, environ={**fake.environ, **variables})


def test_a_job_is_submitted_with_its_script_alone(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.accepts(42)
    assert scheduler(fake).submit(tmp_path / "job.sh", tmp_path) == "42"
    assert fake.calls("sbatch") == [f"sbatch --parsable --chdir={tmp_path} {tmp_path}/job.sh"]


def test_variables_that_would_change_the_job_do_not_reach_sbatch(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.accepts(42)
    inside = {
        "SBATCH_PARTITION": "debug",
        "SLURM_JOB_ID": "7",
        "SLURM_MEM_PER_CPU": "100",
        "SLURM_CONF": "/etc/slurm.conf",
        "MY_VARIABLE": "kept",
    }
    scheduler(fake, **inside).submit(tmp_path / "job.sh", tmp_path)
    seen = fake.environment_of("sbatch")
    assert seen["SLURM_CONF"] == "/etc/slurm.conf"
    assert seen["MY_VARIABLE"] == "kept"
    assert not {"SBATCH_PARTITION", "SLURM_JOB_ID", "SLURM_MEM_PER_CPU", "SLURM_TIME_FORMAT"} & set(seen)
    assert overriding_variables(inside) == {"SBATCH_PARTITION": "debug"}


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (
            "Batch job submission failed: Invalid account or account/partition combination specified",
            "--account",
        ),
        ("invalid partition specified: gpus", "sinfo -s"),
        ("Batch job submission failed: Invalid qos specification", "slurm.qos"),
        (
            "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's "
            "size and/or time limits)",
            "limit of your account or QOS",
        ),
        ("QOSMaxWallDurationPerJobLimit", "--walltime"),
        (
            "Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
            "--walltime",
        ),
        ("Batch job submission failed: Node count specification invalid", "--nodes"),
        ("Batch job submission failed: Requested node configuration is not available", "sinfo -o"),
        ("Batch job submission failed: Invalid generic resource (gres) specification", "slurm.gpu_request"),
        ("Batch job submission failed: Invalid feature specification", "slurm.constraint"),
        ("Batch job submission failed: Requested reservation is invalid", "slurm.reservation"),
        ("Batch job submission failed: Memory specification can not be satisfied", "slurm.memory"),
        ("unrecognized option '--segment=2'", "slurm.segment"),
        ("Batch job submission failed: User's group not permitted to use this partition", "--partition"),
    ],
)
def test_a_refusal_keeps_slurms_words_and_names_the_remedy(
    fake: FakeSlurm, tmp_path: Path, text: str, hint: str
) -> None:
    fake.refuses(text)
    with pytest.raises(SlurmError) as caught:
        scheduler(fake).submit(tmp_path / "job.sh", tmp_path)
    assert text in caught.value.message
    assert hint in (caught.value.hint or "")
    assert not isinstance(caught.value, SlurmDown)


def test_a_refusal_nobody_knows_is_shown_as_it_is(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.refuses("your project has expired, mail help@example.org")
    with pytest.raises(SlurmError, match="your project has expired") as caught:
        scheduler(fake).submit(tmp_path / "job.sh", tmp_path)
    assert caught.value.hint is None


def test_without_slurm_the_local_site_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    lonely = SlurmScheduler(environ={"PATH": str(tmp_path / "empty")})
    with pytest.raises(SlurmError, match="not on this host's PATH") as caught:
        lonely.submit(tmp_path / "job.sh", tmp_path)
    assert "--site local" in (caught.value.hint or "")


def test_a_controller_that_is_down_is_told_apart_from_a_refusal(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.is_down()
    with pytest.raises(SlurmDown, match="Unable to contact"):
        scheduler(fake).state(["42"])
    with pytest.raises(SlurmDown, match="sbatch got no answer"):
        scheduler(fake).submit(tmp_path / "job.sh", tmp_path)


def test_a_command_that_hangs_is_given_up(fake: FakeSlurm) -> None:
    fake.hangs("squeue")
    with pytest.raises(SlurmDown, match="gave no answer"):
        scheduler(fake, timeout=0.2).state(["42"])


def test_all_jobs_are_asked_for_at_once(fake: FakeSlurm) -> None:
    fake.shows("1|PENDING|N/A|N/A||Resources", "2|RUNNING|1|2|n1|None")
    states = scheduler(fake).state(["1", "2"])
    assert {job: state.state for job, state in states.items()} == {"1": "PENDING", "2": "RUNNING"}
    assert len(fake.calls()) == 1


def test_a_job_squeue_has_forgotten_is_looked_up_in_accounting(fake: FakeSlurm) -> None:
    fake.forgets_everything()
    fake.remembers("42|TIMEOUT|1790000000|1790003600|n1|0:15")
    assert scheduler(fake).state(["42"])["42"].words == "ended at the end of its walltime"


def test_a_job_nobody_remembers_is_gone_and_accounting_is_asked_once(fake: FakeSlurm) -> None:
    fake.forgets_everything()
    asking = scheduler(fake)
    assert asking.state(["42"])["42"].phase == "gone"
    assert asking.state(["42"])["42"].over
    assert len(fake.calls("sacct")) == 1


def test_stop_signals_the_script_first_and_everything_by_force(fake: FakeSlurm) -> None:
    scheduler(fake).cancel("42", force=False)
    scheduler(fake).cancel("42", force=True)
    assert fake.calls("scancel") == ["scancel --signal=TERM --batch 42", "scancel 42"]


def test_cancelling_a_job_that_is_over_is_no_error(fake: FakeSlurm) -> None:
    fake.says(
        "scancel",
        "",
        error="scancel: error: Kill job error on job id 42: Job/step already completing or completed\n",
        status=1,
    )
    scheduler(fake).cancel("42", force=True)


def test_a_cancel_that_is_denied_is_an_error(fake: FakeSlurm) -> None:
    fake.says(
        "scancel",
        "",
        error="scancel: error: Kill job error on job id 42: Access/permission denied\n",
        status=1,
    )
    with pytest.raises(SlurmError, match="permission denied"):
        scheduler(fake).cancel("42", force=True)
