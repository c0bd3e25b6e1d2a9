"""Programs that run inside a job: `python -m hpcserve.batch {check|drive} OUT`, and `… api DIR`.

The first two end with 0 when there is nothing more to do, 75 when there is, and with an error's own status.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..errors import MORE_TO_DO, HpcserveError, JobError, TooManyErrors
from . import history
from .api import process as api
from .api.carrier import AT_ONCE
from .api.handler import MAX_FILE
from .driver import ERROR_RATE, Driver, Limits
from .finish import answered, finish, settle
from .layout import BatchDir
from .members import this_process
from .merge import Unfinished
from .progress import Progress
from .sending import Endpoint
from .work import Work, make_directory

COMPLETE = 0


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    os.umask(0o077)
    try:
        if options.program == "api":
            return api.run(_settings(options))
        directory = BatchDir(options.out)
        if options.program == "check":
            return check(directory, merge_apart=options.merge_apart)
        limits = Limits(error_rate=options.max_error_rate)
        return drive(directory, options.endpoint, limits, merge_apart=options.merge_apart)
    except HpcserveError as error:
        print(error.report(), file=sys.stderr)
        return error.exit_code


def check(directory: BatchDir, *, merge_apart: bool = False) -> int:
    """Is there something to do that is worth loading a model for? Merging is not. Raises TooManyErrors, when
    the job before stopped for them, JobError, when the last jobs got nothing done, RunError and
    StorageError."""
    if settle(directory):
        print(f"{directory.out} is complete", file=sys.stderr)
        return COMPLETE
    parts = history.read(directory)
    if history.gave_up(directory, parts):
        raise TooManyErrors(
            f"the job before stopped: {parts[-1].how}",
            hint="when the cause is mended, the same command sends the rows that failed again",
        )
    if answered(directory):
        return _finish(directory, partial(print, file=sys.stderr), merge_apart=merge_apart)
    if directory.stop.exists():
        print(f"the batch in {directory.out} was stopped; the same command goes on with it", file=sys.stderr)
        return COMPLETE
    if history.stuck(directory, parts):
        raise JobError(
            f"the last {history.STUCK} jobs of {directory.out} had no result: {parts[-1].how}",
            hint="`hpcserve logs` of the last run shows why; the same command tries again",
        )
    return MORE_TO_DO


def drive(directory: BatchDir, endpoint: Path, limits: Limits, *, merge_apart: bool = False) -> int:
    """Work on the batch until it is complete or this job's time is up; returns the exit status.

    `merge_apart`: until all is answered; another job merges it.

    Raises StorageError, RunError, ConfigError, and TooManyErrors.
    """
    me = this_process(os.environ)
    progress = Progress()
    make_directory(directory.history)
    how, gave_up = "killed", False
    work = Work(directory, me)
    try:
        how = asyncio.run(_drive(work, Endpoint(endpoint), progress, limits))
    except HpcserveError as error:
        how, gave_up = error.message.splitlines()[0], isinstance(error, TooManyErrors)
        raise
    finally:
        try:
            work.close()
        finally:
            history.note(directory, me.name, me.slurm_job, progress, how, endpoint, gave_up=gave_up)
    if how == "others":
        progress.note("all that is left is in the hands of other jobs")
        return COMPLETE
    if how == "more":
        return MORE_TO_DO
    return _finish(directory, progress.note, merge_apart=merge_apart)


def _finish(directory: BatchDir, say: Callable[[str], object], *, merge_apart: bool) -> int:
    """All is answered; returns the exit status."""
    if merge_apart:
        say("all rows are answered; another job merges them")
        return COMPLETE
    try:
        merged = finish(directory)
    except Unfinished as error:
        say(f"{error.items} lines of the journals are damaged; their rows are done again")
        return MORE_TO_DO
    say(f"complete: {merged.items:,} rows, {merged.failed:,} of them errors: {merged.output}")
    return COMPLETE


async def _drive(work: Work, endpoint: Endpoint, progress: Progress, limits: Limits) -> str:
    driver = Driver(work, endpoint, progress, limits)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, driver.stop, f"signal {number.name}")
    return await driver.run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hpcserve.batch", description=__doc__)
    programs = parser.add_subparsers(dest="program", required=True)
    for name in ("check", "drive"):
        program = programs.add_parser(name)
        program.add_argument("out", type=Path)
        program.add_argument("--merge-apart", action="store_true", help="leave the merge to another job")
        if name == "drive":
            program.add_argument("--endpoint", type=Path, required=True, help="the run's endpoint.json")
            program.add_argument("--max-error-rate", type=float, default=ERROR_RATE)
    _add_api(programs.add_parser("api", description=api.__doc__))
    return parser


def _add_api(program: argparse.ArgumentParser) -> None:
    add = program.add_argument
    add("directory", type=Path, metavar="DIR", help="the run's `batches`")
    add("--endpoint", type=Path, required=True, help="the run's endpoint.json; it may come later")
    add("--model", required=True, help="hub id or directory, whose tokenizer counts prompts")
    add("--revision")
    add("--at-once", type=int, default=AT_ONCE, help="batches driven at the same time")
    add("--max-file", type=int, default=MAX_FILE, help="bytes of an uploaded file")
    add("--with-parent", action="store_true", help="end when standard input does")


def _settings(options: argparse.Namespace) -> api.Settings:
    told = vars(options)
    told.pop("program")
    return api.Settings(**told)


if __name__ == "__main__":
    sys.exit(main())
