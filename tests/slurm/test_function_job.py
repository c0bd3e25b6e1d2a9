"""Jobs that call a Python function, with the real submitit and a fake Slurm."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from hpcserve.config.site import SetupSite, Site
from hpcserve.config.sites import find_site
from hpcserve.errors import ConfigError, SlurmError
from hpcserve.slurm import function_job
from hpcserve.slurm.scheduler import JobState

from .fake_slurm import FakeSlurm

_RUN = """\
for script in "$@"; do :; done
(
  export SLURM_JOB_ID=42 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
  bash "$script"
) >"$here/job.log" 2>&1 &
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", fake.path)
    fake.says("sbatch", "Submitted batch job 42\n")
    fake.shows("42|RUNNING|N/A|N/A|n1|None")
    return fake


@pytest.fixture
def site() -> Site:
    site = find_site("test-cluster", environ={}, hostname="").value
    slurm = replace(site.slurm, cpu_partition="cpu", cpu_memory="8G", account="physics", max_walltime=5400)
    return replace(site, slurm=slurm)


def lines(folder: Path) -> list[str]:
    [script] = folder.glob("*_submission.sh")
    return script.read_text().splitlines()


def test_a_function_is_called_in_the_job_and_its_result_comes_back(
    fake: FakeSlurm, site: Site, tmp_path: Path
) -> None:
    fake.runs(_RUN)
    job = function_job.submit(site, tmp_path / "job", "sum", 60, sum, [1, 2, 3])
    assert job.job_id == "42"
    assert job.result() == 6


def test_the_script_asks_for_what_the_site_says_and_for_no_gpu(
    fake: FakeSlurm, site: Site, tmp_path: Path
) -> None:
    setup = SetupSite(modules=("python/3.11",), script="source venv\n", env={"HF_HUB_OFFLINE": "1 2"})
    folder = tmp_path / "job"
    function_job.submit(replace(site, setup=setup), folder, "sum", 600, sum, [1], after=("7", "8"))
    found = lines(folder)
    asked = {line.removeprefix("#SBATCH ") for line in found if line.startswith("#SBATCH")}
    assert asked >= {
        "--account=physics", "--partition=cpu", "--mem=8G", "--nodes=1", "--cpus-per-task=2",
        "--job-name=sum", "--dependency=afterany:7:8",
        "--time=90",  # of 600 minutes, as many as the site's jobs may take
    }  # fmt: skip
    assert not any("gpu" in one or "gres" in one or "exclusive" in one for one in asked)
    assert not any(line.startswith("srun") for line in found)
    assert {"module load python/3.11 || exit 3", "source venv", "export HF_HUB_OFFLINE='1 2'"} <= set(found)


def test_nobody_else_can_read_what_the_call_was(fake: FakeSlurm, site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    function_job.submit(site, folder, "sum", 60, sum, [1])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_variables_that_would_change_the_job_do_not_reach_sbatch(
    fake: FakeSlurm, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "debug")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("MY_VARIABLE", "kept")
    function_job.submit(site, tmp_path / "job", "sum", 60, sum, [1])
    seen = fake.environment_of("sbatch")
    assert seen["MY_VARIABLE"] == "kept"
    assert not {"SBATCH_PARTITION", "SLURM_JOB_ID"} & set(seen)
    assert os.environ["SBATCH_PARTITION"] == "debug"


def _bad() -> None:
    raise ConfigError("row 7 has no column `text`", hint="mend it")


def test_an_error_of_the_function_is_raised_where_its_result_is_read(
    fake: FakeSlurm, site: Site, tmp_path: Path
) -> None:
    fake.runs(_RUN)
    job = function_job.submit(site, tmp_path / "job", "bad", 60, _bad)
    with pytest.raises(ConfigError, match="row 7 has no column") as caught:
        job.result()
    assert caught.value.hint == "mend it"


def test_a_refusal_is_told_in_slurms_words(
    fake: FakeSlurm, site: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake.refuses("invalid partition specified: cpu")
    with pytest.raises(SlurmError, match="refused the job sum: invalid partition specified: cpu") as caught:
        function_job.submit(site, tmp_path / "job", "sum", 60, sum, [1])
    assert "sinfo -s" in str(caught.value.hint)
    assert capfd.readouterr() == ("", "")


def test_a_job_that_ends_without_a_result_is_told_with_its_last_words(
    fake: FakeSlurm, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(function_job, "_LAST_WORDS", 0.1)
    fake.shows("42|OUT_OF_MEMORY|N/A|N/A|n1|None")
    folder = tmp_path / "job"
    job = function_job.submit(site, folder, "sum", 60, sum, [1])
    (folder / "42_0_log.err").write_text("slurmstepd: error: Detected 1 oom-kill event(s)\n")
    seen: list[JobState] = []
    with pytest.raises(SlurmError, match=r"job 42 ended without a result[\s\S]*oom-kill") as caught:
        job.result(seen.append)
    assert "cpu_memory" in str(caught.value.hint)
    assert [state.state for state in seen] == ["OUT_OF_MEMORY"]
