"""The last entry of the event log, for jobs that ended without one: `python -m hpcserve.node close`.

srun may abort the rendezvous before any rank can say why, a process may be killed, an environment may
be broken: the job script runs this last, so that `hpcserve status` can tell why a run is over.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any, Literal

from ...errors import JobError
from ...rundir.atomic import read_json
from ...rundir.logs import last_error
from ..inputs import Inputs
from ..journal import LAST, note_job_started, open_journal, this_attempt
from ..rank import node_names

Stage = Literal["stop-file", "batch-check", "rendezvous", "preflight", "staging", "serving"]
_TRY_AGAIN = 75
"""Exit status of a rank whose transport can't be used here."""
_TOLD = (128 + signal.SIGTERM, 128 + signal.SIGUSR1)
"""Exit statuses of a head process that was told to end before it listened to signals."""


def close_log(inputs: Inputs, *, stage: Stage, status: int, signalled: bool) -> None:
    """Write `failed` or `stopped`, unless this attempt has one. `status` is the job's exit status."""
    with open_journal(inputs) as journal:
        note_job_started(inputs, journal)
        if any(event["event"] in LAST for event in this_attempt(inputs)):
            return
        if stage == "stop-file":
            journal.write("stopped", reason="the file `stop` was in the run directory before the job began")
        elif stage == "batch-check" and status == 0:
            journal.write("stopped", reason="there was nothing to do for the batch; logs/job.log says why")
        elif signalled and stage == "rendezvous":
            journal.write("stopped", reason="signal SIGTERM before the rendezvous was over")
        elif signalled and stage == "preflight":
            journal.write(
                "stopped", reason="signal SIGTERM during the preflight, before any engine was started"
            )
        elif signalled and stage == "staging":
            journal.write("stopped", reason="signal SIGTERM while the model was staged")
        elif signalled and status in _TOLD:
            journal.write("stopped", reason="signal SIGTERM before the head process was up")
        else:
            error, code = _why(inputs, stage, status)
            journal.write("failed", message=error.message, hint=error.hint, exit_code=code)


def _why(inputs: Inputs, stage: Stage, status: int) -> tuple[JobError, int]:
    if stage == "batch-check":
        error = JobError("the batch can't go on", hint="logs/job.log says why, at its end")
        return _in_log(inputs, "job.log", error), status or JobError.exit_code
    if stage == "staging":
        error = JobError(
            f"staging the model {_ended(status)} without a word",
            hint="logs/staging-RANK.log and logs/job.log have the last lines",
        )
        return _in_log(inputs, "staging-0.log", error), status or JobError.exit_code
    if stage == "serving":
        return JobError(
            f"the head process {_ended(status)} without a word",
            hint="logs/head.log has its last lines; a node that ran out of memory looks like this",
        ), status or JobError.exit_code
    if stage == "preflight":
        return JobError(
            f"the preflight {_ended(status)} without a word", hint="logs/preflight-0.log has its last lines"
        ), status or JobError.exit_code
    found = _gave_up(inputs)
    if found is not None:
        return found
    return _never_met(inputs, status), JobError.exit_code


def _in_log(inputs: Inputs, name: str, unsaid: JobError) -> JobError:
    """The last error that a log tells; `unsaid` where it has none."""
    told = last_error(inputs.run.logs / name)
    return unsaid if told is None else JobError(told.message, hint=told.hint or unsaid.hint)


def _gave_up(inputs: Inputs) -> tuple[JobError, int] | None:
    """What a rank said when it left the rendezvous; rank 0 knows most."""
    said = sorted(
        _verdicts(inputs), key=lambda entry: (entry["error"].get("exit_code") == _TRY_AGAIN, entry["rank"])
    )
    if not said:
        return None
    entry = said[0]
    error, message = entry["error"], str(entry["error"].get("message"))
    where = "" if entry["rank"] == 0 else f"rank {entry['rank']} ({entry.get('node')}): "
    code = int(error.get("exit_code") or JobError.exit_code)
    if code == _TRY_AGAIN:
        code = JobError.exit_code
    return JobError(where + message, hint=error.get("hint")), code


def _verdicts(inputs: Inputs) -> Iterator[dict[str, Any]]:
    for rank in range(inputs.plan.nodes):
        try:
            entry = read_json(inputs.run.path / "rendezvous" / f"gave-up-{rank}.json")
        except FileNotFoundError:
            continue
        if entry.get("attempt") == inputs.attempt and isinstance(entry.get("error"), dict):
            yield {**entry, "rank": rank}


def _never_met(inputs: Inputs, status: int) -> JobError:
    absent = [rank for rank in range(inputs.plan.nodes) if not _came(inputs, rank)]
    names = node_names(inputs.environ)
    who = ", ".join(f"{rank} ({names[rank]})" if rank < len(names) else str(rank) for rank in absent[:16])
    more = " …" if len(absent) > 16 else ""
    told = f"; never started: rank{'s' if len(absent) > 1 else ''} {who}{more}" if absent else ""
    return JobError(
        f"the rendezvous {_ended(status)} before all ranks had met{told}",
        hint="logs/job.log has srun's own message; a node that is down or lacks the Python environment looks"
        " like this",
    )


def _came(inputs: Inputs, rank: int) -> bool:
    try:
        return bool(read_json(inputs.run.rank(rank)).get("attempt") == inputs.attempt)
    except FileNotFoundError:
        return False


def _ended(status: int) -> str:
    number = status - 128
    if number in set(signal.Signals):
        return f"was ended by {signal.Signals(number).name}"
    return f"ended with status {status}"
