"""Names of the files of a batch, all below its output directory.

output.jsonl | output.parquet    the answers; there only when they are complete
errors.jsonl                     rows that got none (OpenAI's format; tables say it in the column `error`)
report.json .txt .svg            what it cost
.batch/                          the work in progress
    plan/                        made whole, under another name, and then renamed
        manifest.json            what is asked, of what
        requests-NNNNN.data      rendered requests, one a line
        places.bin               where each is, and what it costs
        order.bin                the order of work
    journals/NNNNNN.data .index  what came back, by one writer each
    claims/RRRR.NNNNNN           who does which stretch of round R's work
    claims/RRRR.work             the work of a round after the first
    jobs/JOB                     jobs that took part
    history/JOB.json             what each of them did, at its end
    merge/                       submitit's files of the job that merges, where that is one of its own
    status.json                  how it goes
    stop                         exists once somebody asked it to stop
    asked                        jobs noted when the command was last given again; they count no more
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class BatchDir:
    """Paths below one output directory."""

    out: Path

    @property
    def work(self) -> Path:
        return self.out / ".batch"

    @property
    def plan(self) -> Path:
        return self.work / "plan"

    @property
    def manifest(self) -> Path:
        return self.plan / "manifest.json"

    @property
    def journals(self) -> Path:
        return self.work / "journals"

    @property
    def claims(self) -> Path:
        return self.work / "claims"

    @property
    def jobs(self) -> Path:
        return self.work / "jobs"

    @property
    def history(self) -> Path:
        return self.work / "history"

    @property
    def merge(self) -> Path:
        return self.work / "merge"

    @property
    def status(self) -> Path:
        return self.work / "status.json"

    @property
    def stop(self) -> Path:
        return self.work / "stop"

    @property
    def asked(self) -> Path:
        return self.work / "asked"

    @property
    def report(self) -> Path:
        return self.out / "report.json"

    @property
    def report_plot(self) -> Path:
        return self.out / "report.svg"

    @property
    def report_text(self) -> Path:
        return self.out / "report.txt"
