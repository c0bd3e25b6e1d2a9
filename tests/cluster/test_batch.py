"""`hpcserve batch` on real Slurm: chains over walltimes, requeue, cancellation and stop, each row once."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .launched import Launched, Launches
from .testbed import Testbed, wait_for

ROWS = 900
MODEL = """\
model: example/nothing-to-load
served_name: fake
engine: fake
prefill: {replicas: 1, nodes: 1}
decode: {replicas: 1, nodes: 1}
drain: 5
engine_args: {itl-ms: 20, max-num-seqs: 8}
"""
"""400 tokens a second: the rows take about 25 s."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A dataset in a user's home, and what becomes of it."""

    launches: Launches
    model: Path
    data: Path

    @property
    def out(self) -> Path:
        return self.data.with_suffix(".out")

    def __call__(self, *flags: str, check: bool = True) -> Any:
        return self.launches.hpcserve(
            "batch", "--site=test-cluster", "--nodes=2", "--no-wait", "--json", *flags,
            str(self.model), str(self.data), "-o", str(self.out), check=check,
        )  # fmt: skip

    def submit(self, *flags: str) -> list[str]:
        """Names of the runs."""
        names: list[str] = json.loads(self(*flags).stdout)["runs"]
        return names

    def run(self, name: str) -> Launched:
        runs = json.loads(self.launches.hpcserve("ls", "--json").stdout)["runs"]
        return Launched(self.launches, next(run for run in runs if run["name"] == name))

    def job(self, name: str) -> str:
        return self.run(name).job_id

    @property
    def parts(self) -> list[dict[str, Any]]:
        """What each job noted at its end."""
        return [json.loads(path.read_text()) for path in self.out.glob(".batch/history/*.json")]

    @property
    def done(self) -> int:
        return sum(self.done_by.values())

    @property
    def done_by(self) -> Counter[str]:
        """Lines in each journal that has any; those that the merge removes meanwhile don't count."""
        lines: Counter[str] = Counter()
        for path in self.out.glob(".batch/journals/*.data"):
            with suppress(FileNotFoundError):
                lines[path.name] = path.read_bytes().count(b"\n")
        return +lines

    @property
    def complete(self) -> bool:
        return (self.out / "report.txt").exists()

    def logs(self) -> str:
        home = self.launches.cluster.home(self.launches.user)
        ends = [f"--- {path}\n{path.read_text()[-1500:]}" for path in home.rglob("logs/*.log")]
        return "\n".join([self.launches.cluster.slurm("squeue"), *ends])

    def check_rows(self) -> None:
        lines = (self.out / "output.jsonl").read_text().splitlines()
        counts = Counter(json.loads(line)["custom_id"] for line in lines)
        assert counts == Counter({f"r{number}": 1 for number in range(ROWS)})
        assert (self.out / "errors.jsonl").read_text() == ""


@pytest.fixture
def batch(launches: Launches, request: pytest.FixtureRequest) -> Batch:
    name = request.node.name.replace("[", "-").rstrip("]")[:40]
    lines = []
    for number in range(ROWS):
        body = {"model": "fake", "prompt": f"row {number}", "max_tokens": 11, "ignore_eos": True}
        line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}
        lines.append(json.dumps(line) + "\n")
    model = launches.file(f"{name}.yaml", MODEL)
    batch = Batch(launches, model, launches.file(f"{name}.jsonl", "".join(lines)))
    shutil.rmtree(batch.out, ignore_errors=True)  # of an earlier session: homes outlive the cluster
    return batch


def no_job(cluster: Testbed) -> bool:
    return not cluster.slurm("squeue", "--noheader")


@pytest.mark.timeout(600)
def test_a_chain_of_jobs_finishes_what_needs_several_walltimes(cluster: Testbed, batch: Batch) -> None:
    batch.submit("--walltime=00:01:00", "--jobs=14", "--set=engine_args.itl-ms=50")
    wait_for(lambda: batch.complete, seconds=500, what="the chain to finish", state=batch.logs)
    batch.check_rows()
    worked = [part for part in batch.parts if part["results"]]
    assert len(worked) >= 3
    assert [part["how"] for part in worked].count("complete") == 1
    report = json.loads((batch.out / "report.json").read_text())
    assert report["computed_more_than_once"] < 0.05 * ROWS
    # Those that were left find that there is nothing to do, without loading a model.
    wait_for(lambda: no_job(cluster), what="the rest of the chain to end", state=batch.logs)
    assert len(batch.parts) == len(worked)


@pytest.mark.timeout(400)
def test_a_job_that_is_cancelled_or_requeued_loses_nothing(cluster: Testbed, batch: Batch) -> None:
    [name] = batch.submit("--set=engine_args.itl-ms=40")
    wait_for(lambda: batch.done > 50, what="the first rows", state=batch.logs)
    job = batch.job(name)
    cluster.slurm("scontrol", "update", f"JobId={job}", "Requeue=1")
    cluster.slurm("scontrol", "requeue", job)
    wait_for(
        lambda: cluster.slurm("squeue", "--noheader", f"--jobs={job}", "--format=%t").strip() == "PD",
        what="the job to be back in the queue", state=batch.logs,
    )  # fmt: skip
    # Slurm would let it wait for two minutes.
    cluster.slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
    before = batch.done
    wait_for(lambda: batch.done > before + 50, what="the requeued job to go on", state=batch.logs)
    cluster.slurm("scancel", job)
    wait_for(lambda: no_job(cluster), what="the cancelled job to end", state=batch.logs)
    assert not batch.complete
    batch.submit("--set=engine_args.itl-ms=40")
    wait_for(lambda: batch.complete, what="the second job to finish", state=batch.logs)
    batch.check_rows()


@pytest.mark.timeout(400)
def test_stop_ends_the_whole_chain_and_the_same_command_goes_on(cluster: Testbed, batch: Batch) -> None:
    first, *_ = batch.submit("--jobs=3")
    wait_for(lambda: batch.done > 50, what="the first rows", state=batch.logs)
    batch.launches.hpcserve("stop", first)
    wait_for(lambda: no_job(cluster), what="the chain to end", state=batch.logs)
    assert not batch.complete
    assert len(batch.parts) == 1
    # Two at once. Whoever of them is ready first begins, and must leave something to the other.
    names = batch.submit("--parallel-jobs=2", "--set=engine_args.fail=slow:factor=20")
    wait_for(lambda: len(batch.done_by) == 3, what="rows of both", state=batch.logs)
    for name in names:
        batch.run(name).fail_engine("decode-0", {"mode": "reset"})
    wait_for(lambda: batch.complete, what="the rows to be finished", state=batch.logs)
    batch.check_rows()
    wait_for(lambda: no_job(cluster), what="the other job to end", state=batch.logs)
    jobs = {batch.job(name) for name in names}
    assert {part["slurm_job"] for part in batch.parts if part["results"]} >= jobs
    report = json.loads((batch.out / "report.json").read_text())
    assert report["computed_more_than_once"] < 0.05 * ROWS


@pytest.mark.timeout(400)
def test_a_job_that_is_preempted_loses_nothing(cluster: Testbed, batch: Batch) -> None:
    """Somebody with more right to the nodes takes them all: the chain's next job goes on after that."""
    first, second = batch.submit("--jobs=2", "--set=engine_args.itl-ms=40")
    wait_for(lambda: batch.done > 50, what="the first rows", state=batch.logs)
    job = batch.job(first)
    cluster.slurm(
        "sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--wrap=sleep 2", "--output=/dev/null"
    )
    running = ("squeue", "--noheader", f"--jobs={job}", "--states=R,CG")
    wait_for(lambda: not cluster.slurm(*running).strip(), what="the preemption", state=batch.logs)
    assert not batch.complete
    wait_for(lambda: batch.complete, what="the next job to finish", state=batch.logs)
    batch.check_rows()
    assert "PREEMPTED" in cluster.slurm("scontrol", "show", "job", job)
    assert batch.job(second) in {part["slurm_job"] for part in batch.parts if part["how"] == "complete"}


@pytest.mark.timeout(400)
def test_a_large_batch_is_planned_and_merged_in_jobs_without_gpus(cluster: Testbed, batch: Batch) -> None:
    site = batch.launches.file(
        "with-cpus.yaml",
        "extends: test-cluster\nname: with-cpus\nslurm: {cpu_partition: main, cpu_job_from: 0}\n",
    )
    name = "large"
    batch.submit(f"--site={site}", f"--name={name}")
    wait_for(lambda: batch.complete, what="the merge", state=batch.logs)
    batch.check_rows()
    wait_for(lambda: no_job(cluster), what="the jobs to end", state=batch.logs)
    jobs = [
        dict(field.split("=", 1) for field in job.split() if "=" in field)
        for job in cluster.slurm("scontrol", "show", "job", "--oneliner").splitlines()
    ]
    mine = {job["JobName"]: job for job in jobs if job["JobName"].startswith(name)}
    assert set(mine) == {name, f"{name}-plan", f"{name}-merge"}
    assert all(job["JobState"] == "COMPLETED" for job in mine.values())
    assert "gres" not in mine[f"{name}-merge"].get("TresPerNode", "")
    # The batch's own job ended when all was answered.
    [part] = batch.parts
    assert part["how"] == "complete"
    assert mine[name]["EndTime"] <= mine[f"{name}-merge"]["StartTime"]
    # Nothing is done again, and nothing is left beside the runs.
    assert json.loads(batch(f"--site={site}").stdout)["state"] == "complete"
    root = batch.launches.cluster.home(batch.launches.user)
    assert not list(root.rglob(f".{name}-plan*"))
