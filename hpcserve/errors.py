"""Every error hpcserve raises on purpose.

HpcserveError                 what users see as `error:` and `hint:`
├── UsageError            2   the command line is wrong
├── ConfigError           3   model.yaml, a site config, a flag's value or a variable is wrong
├── PlanError             4   the request can't be placed on these nodes and GPUs
├── SlurmError            5   Slurm refused the job, or can't be reached
│   └── SlurmDown         5   its controller gave no answer; asking again later makes sense
├── JobError              6   the job ran and failed
│   ├── RendezvousError   6   a rank is missing, or ranks disagree
│   ├── EngineError       6   an engine did not start or died for good
│   └── KVPathError       6   no KV bytes moved between prefill and decode
├── StorageError          7   a run directory can't be written: permissions, quota, full disk
├── RunError              8   no such run, or its endpoint does not answer
└── TooManyErrors         9   so many rows of a batch fail that going on would waste the job

The number is the command's exit status. 0 is success, 1 is a bug in hpcserve (a traceback is
printed), 130 is Ctrl-C. 75 is no error: a batch has more to do, and the same command goes on with it.
"""

from __future__ import annotations

MORE_TO_DO = 75
"""sysexits.h's EX_TEMPFAIL: the exit status where a batch is left unfinished, and nothing is wrong."""


class HpcserveError(Exception):
    """A failure with a remedy: `message` says what and where, `hint` says what to do."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message

    def report(self) -> str:
        """The text for stderr: `error: …` and, after an empty line, `hint: …`."""
        text = f"error: {self.message}"
        return f"{text}\n\nhint: {self.hint}" if self.hint else text


class UsageError(HpcserveError):
    exit_code = 2


class ConfigError(HpcserveError):
    """A wrong key or value; `message` starts with `FILE:LINE:` when a file is to blame."""

    exit_code = 3


class PlanError(HpcserveError):
    exit_code = 4


class SlurmError(HpcserveError):
    exit_code = 5


class SlurmDown(SlurmError):
    pass


class JobError(HpcserveError):
    exit_code = 6


class RendezvousError(JobError):
    pass


class EngineError(JobError):
    pass


class KVPathError(JobError):
    pass


class StorageError(HpcserveError):
    exit_code = 7


class RunError(HpcserveError):
    exit_code = 8


class TooManyErrors(HpcserveError):
    exit_code = 9
