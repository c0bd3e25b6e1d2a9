"""A run as seen from the login node: its state, its controller, and how to end it."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import slurm
from .batch.layout import BatchDir
from .errors import JobError, RunError, SlurmError, StorageError
from .rundir.atomic import read_json, write_text
from .rundir.events import Event, read_events
from .rundir.logs import Said, Wanted, last_error, log_files
from .rundir.runs import Run, read_key
from .slurm.scheduler import JobState

State = Literal["queued", "starting", "ready", "draining", "ending", "stopped", "failed", "ended", "unknown"]
"""Of a run. `ended`: its job is gone and nothing says whether it was meant to be."""

LIVE: tuple[State, ...] = ("queued", "starting", "ready", "draining", "ending", "unknown")
_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """One line of `hpcserve ls`."""

    run: Run
    state: State
    detail: str
    """In plain words: why it waits, how it ended."""
    job: JobState | None
    end: float | None
    """Unix seconds at which the walltime ends."""


def events(run: Run) -> list[Event]:
    return [event for event, _ in read_events(run.directory.events)]


def last_attempt(log: Sequence[Event]) -> Sequence[Event]:
    """What happened since the job script began for the last time: Slurm may have put the job back."""
    starts = [place for place, event in enumerate(log) if event["event"] == "job-started"]
    return log[starts[-1] :] if starts else log


def overview(runs: Sequence[Run]) -> tuple[list[Overview], SlurmError | None]:
    """The state of every run, with one question per scheduler.

    When a scheduler can't answer, its runs get what their files say, and its error is returned.
    """
    logs = [_readable_log(run) for run in runs]
    open_runs = [run for run, log in zip(runs, logs, strict=True) if not _closed(log)]
    jobs, outage = job_states(open_runs)
    found = [
        _overview(run, log, jobs.get(run.record.job_id or "")) for run, log in zip(runs, logs, strict=True)
    ]
    return found, outage


def _readable_log(run: Run) -> Sequence[Event]:
    """What one run's broken file says must not hide the others: it becomes that run's own failure."""
    try:
        return last_attempt(events(run))
    except StorageError as error:
        return [{"event": "unreadable", "t": 0.0, "message": error.message}]


def job_states(runs: Iterable[Run]) -> tuple[dict[str, JobState], SlurmError | None]:
    ids: dict[Literal["slurm", "local"], list[str]] = {"slurm": [], "local": []}
    for run in runs:
        record = run.record
        if record.job_id is not None and not _elsewhere(run):
            ids["local" if record.scheduler == "local" else "slurm"].append(record.job_id)
    found: dict[str, JobState] = {}
    outage: SlurmError | None = None
    for kind, wanted in ids.items():
        try:
            found |= slurm.get(kind).state(wanted) if wanted else {}
        except SlurmError as error:
            outage = error
    return found, outage


def _elsewhere(run: Run) -> bool:
    """A local job can be seen and signalled on its own host only."""
    return run.record.scheduler == "local" and run.record.host != os.uname().nodename


def _closed(log: Sequence[Event]) -> bool:
    return any(event["event"] in ("stopped", "failed") for event in log)


def _overview(run: Run, log: Sequence[Event], job: JobState | None) -> Overview:
    state, detail = _state(run, log, job)
    started = next((event.get("end_time") for event in log if event["event"] == "job-started"), None)
    end = job.end if job is not None and job.end is not None else started
    return Overview(run=run, state=state, detail=detail, job=job, end=end if state in LIVE else None)


def _state(run: Run, log: Sequence[Event], job: JobState | None) -> tuple[State, str]:
    last = {event["event"]: event for event in log}
    if "failed" in last:
        return "failed", str(last["failed"].get("message", ""))
    if "stopped" in last:
        said = None if "ready" in last or run.directory.stop.exists() else _last_error(run, log)
        if said is not None:
            # Nobody asked: the job script gave up and told the head to end.
            return "failed", said.message
        return "stopped", str(last["stopped"].get("reason", ""))
    if run.record.job_id is None:
        return "ended", "it was never submitted"
    if job is None:
        where = f"it is on {run.record.host}" if _elsewhere(run) else "the scheduler gave no answer"
        return "unknown", where
    if job.over:
        return _end_without_a_word(run, log, job)
    if job.phase == "queued":
        return "queued", job.words
    if job.phase == "ending":
        return "ending", job.words
    if "draining" in last:
        return "draining", str(last["draining"].get("reason", ""))
    if "ready" in last:
        return "ready", str(last["ready"].get("url", ""))
    return "starting", job.words


def _end_without_a_word(run: Run, log: Sequence[Event], job: JobState) -> tuple[State, str]:
    """How a job ended whose event log does not say: the last error in its logs, else the scheduler's word."""
    said = _last_error(run, log)
    if said is not None:
        return "failed", f"{said.message} ({job.words})"
    return ("failed" if job.phase == "failed" else "ended"), job.words


def _last_error(run: Run, log: Sequence[Event]) -> Said | None:
    """The error that ended a run, from the logs of its own programs.

    None when the job script has no error to report: then what the others said was not the end.
    """
    logs = run.directory.logs
    by_script = last_error(logs / "job.log")
    if by_script is None or any(event["event"] == "ready" for event in log):
        return by_script
    programs = ["staging", "head", "agent"] if run.directory.roster.exists() else ["rendezvous"]
    files = [file.path for program in programs for file in log_files(logs, Wanted(role=program))]
    return next((said for path in files if (said := last_error(path)) is not None), by_script)


def failure(run: Run, seen: Overview) -> JobError:
    """Why a run is over that is not READY, with the hint of the program that said so."""
    log = last_attempt(events(run))
    told = next((event for event in reversed(log) if event["event"] == "failed"), None)
    if told is not None:
        error = JobError(str(told.get("message") or "the job failed"), hint=told.get("hint"))
        error.exit_code = int(told.get("exit_code") or JobError.exit_code)
        return error
    said = _last_error(run, log) if seen.state == "failed" else None
    name = run.record.run_id
    return JobError(
        f"run {name} is over before it was READY: {seen.detail or seen.state}",
        hint=(said and said.hint) or f"`hpcserve logs {name}` shows everything",
    )


class Controller:
    """The controller on the head node, over HTTP with the job key."""

    def __init__(self, run: Run) -> None:
        """Raises RunError when the run has no controller (yet)."""
        try:
            head = read_json(run.directory.head)
        except FileNotFoundError as error:
            raise RunError(f"run {run.record.run_id} has no controller yet") from error
        self._host = str(head["address"])
        self._port = int(head["port"])
        self._key = read_key(run.directory.job_key)

    def status(self) -> Mapping[str, Any]:
        return self._ask("GET", "/status")

    def drain(self) -> None:
        self._ask("POST", "/drain")

    def stop(self) -> None:
        self._ask("POST", "/stop")

    def _ask(self, method: str, path: str) -> Mapping[str, Any]:
        where = f"{self._host}:{self._port}"
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT)
        try:
            connection.request(method, path, headers={"Authorization": f"Bearer {self._key}"})
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise RunError(
                f"the controller at {where} does not answer: {error}",
                hint="is this a host of the same cluster? `hpcserve logs --role head` says more",
            ) from error
        finally:
            connection.close()
        if response.status != 200:
            raise RunError(f"the controller at {where} answered {response.status}: {body[:200]!r}")
        try:
            answer = json.loads(body) if body else {}
        except ValueError as error:
            raise RunError(f"the controller at {where} did not answer in JSON: {body[:200]!r}") from error
        return answer if isinstance(answer, dict) else {}


def endpoint(run: Run) -> Mapping[str, Any]:
    """endpoint.json. Raises RunError when the run is not READY (yet, or any more)."""
    [seen], _ = overview([run])
    if seen.state not in ("ready", "draining", "unknown"):
        detail = f" ({seen.detail})" if seen.detail else ""
        raise RunError(
            f"run {run.record.run_id} has no endpoint: it is {seen.state}{detail}",
            hint=f"watch it with `hpcserve status {run.record.run_id}`"
            if seen.state in LIVE
            else "launch it again",
        )
    try:
        found: Mapping[str, Any] = read_json(run.directory.endpoint)
    except FileNotFoundError as error:
        raise RunError(
            f"run {run.record.run_id} has no endpoint yet",
            hint=f"watch it with `hpcserve status {run.record.run_id}`",
        ) from error
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """What one call of `stop` did."""

    action: Literal["none", "cancelled", "draining", "forced"]
    detail: str


def stop(run: Run) -> Stopping:
    """Ask a run to end. The first call drains it, the next one forces; a run that is over is left alone."""
    [seen], outage = overview([run])
    job_id = run.record.job_id
    if job_id is not None and _elsewhere(run):
        raise RunError(
            f"run {run.record.run_id} is a local one on {run.record.host}", hint="stop it from that host"
        )
    _stop_batch(run)
    over = seen.state in ("failed", "stopped", "ended")
    # An event says how it ended, but only the scheduler knows that nothing is left running.
    if job_id is None or (over and not _alive(run)):
        return Stopping(action="none", detail=seen.detail or seen.state)
    if outage is not None:
        return _stop_without_scheduler(run, outage)
    scheduler = slurm.get("local" if run.record.scheduler == "local" else "slurm")
    if seen.state == "queued":
        scheduler.cancel(job_id, force=True)
        return Stopping(action="cancelled", detail="it had not started")
    if run.directory.stop.exists() or seen.state in ("failed", "stopped"):
        detail = _tell(run, "stop")
        scheduler.cancel(job_id, force=True)
        return Stopping(action="forced", detail=detail)
    detail = _drain(run)
    if detail:
        scheduler.cancel(job_id, force=False)
    return Stopping(action="draining", detail=detail)


def _stop_batch(run: Run) -> None:
    """Where the run is for a batch, jobs that wait to go on with it must not either."""
    try:
        batch = read_json(run.directory.plan).get("batch")
    except FileNotFoundError:
        return
    if batch is not None:
        stop = BatchDir(Path(batch["output"])).stop
        if stop.parent.is_dir():
            write_text(stop, f"{time.time():.0f}\n")


def _stop_without_scheduler(run: Run, outage: SlurmError) -> Stopping:
    """The controller can end the run as well; only when it does not answer either, nothing can be done."""
    forced = run.directory.stop.exists()
    if _tell(run, "stop") if forced else _drain(run):
        raise outage
    return Stopping(action="forced" if forced else "draining", detail="")


def _drain(run: Run) -> str:
    """Ask for a drain in every way there is. Returns why the controller could not be asked, or nothing."""
    try:
        write_text(run.directory.stop, f"{time.time():.0f}\n")
    except StorageError as error:
        # A full disk must not keep a run alive. Without the file, the controller counts: its second forces.
        return _tell(run, "stop") and error.message
    return _tell(run, "drain")


def _over(run: Run) -> bool:
    if _elsewhere(run):
        return _closed(last_attempt(events(run)))
    jobs, outage = job_states([run])
    if outage is not None:
        return _closed(last_attempt(events(run)))
    job = jobs.get(run.record.job_id or "")
    return job is None or job.over


def _alive(run: Run) -> bool:
    jobs, outage = job_states([run])
    if outage is not None:
        raise outage
    job = jobs.get(run.record.job_id or "")
    return job is not None and not job.over


def _tell(run: Run, what: Literal["drain", "stop"]) -> str:
    """Ask the controller; the answer is why it could not be asked, or empty."""
    try:
        controller = Controller(run)
        controller.drain() if what == "drain" else controller.stop()
    except (RunError, StorageError) as error:
        return error.message
    return ""


def wait_until_over(run: Run, seconds: float) -> bool:
    """True once the job has no process left; False after `seconds`. Asks Slurm less and less often."""
    deadline = time.monotonic() + seconds
    pause, longest = (0.1, 0.5) if run.record.scheduler == "local" else (1.0, 10.0)
    while True:
        if _over(run):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(pause, max(deadline - time.monotonic(), 0.0)))
        pause = min(pause * 1.5, longest)
