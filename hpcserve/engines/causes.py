"""Why an engine died, from the last lines of its log.

Patterns are texts of vLLM 0.32, SGLang 0.5.23, TensorRT-LLM 1.2 with click and Open MPI, PyTorch, Python,
huggingface_hub and NIXL 1.5; the first that matches anywhere in the tail decides, so they go from the certain
to the vague.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .base import Failure


@dataclass(frozen=True, slots=True)
class Cause:
    """One class of death. `pattern` is searched line by line; the line becomes the message."""

    cause: str
    pattern: re.Pattern[str]
    hint: str
    retry: bool = False


def _cause(cause: str, pattern: str, hint: str, *, retry: bool = False) -> Cause:
    return Cause(cause, re.compile(pattern, re.IGNORECASE), hint, retry)


CAUSES: tuple[Cause, ...] = (
    _cause(
        "bad-flag",
        r"unrecognized arguments:|error: argument --|error: ambiguous option|invalid choice:"
        r"|error: the following arguments are required|Extra inputs are not permitted"
        r"|expected (at least )?one argument|Error: No such option|Error: Invalid value for",
        "correct `engine_args` in model.yaml: this version of the engine does not take that flag or value",
    ),
    _cause(
        "port-taken",
        r"EADDRINUSE|address already in use|errno 98\b|port\w* at \d+ is not available in \d+ seconds",
        "another process took the port first; the engine is started again on another one",
        retry=True,
    ),
    _cause(
        "kv-directory",
        r"hpcserve\.errors\.StorageError: |so KV blocks have no name",
        "set `storage.kv` of the site to a directory of yours alone, on a file system that all nodes share; "
        "or leave `kv_offload.shared_gib` out",
    ),
    _cause(
        "disk-full",
        r"no space left on device|ENOSPC|errno 28\b|disk quota exceeded|errno 122\b",
        "free space on that file system, or point `storage.node_local` of the site at another",
    ),
    _cause(
        "out-of-memory",
        r"Insufficient space in /dev/shm",
        "the KV tier in memory lies there: set `kv_offload.cpu_gib` to less, or see on that node who fills "
        "it: `df -h /dev/shm; ls -l /dev/shm`",
        retry=True,
    ),
    _cause(
        "out-of-memory",
        r"Not enough memory\. Please try to increase --mem-fraction-static"
        r"|Capture cuda graph failed: .*out of memory",
        "raise `tensor_parallel`, lower `max_model_len`, or set `mem-fraction-static` in `engine_args`",
    ),
    _cause(
        "out-of-memory",
        r"out of memory|OutOfMemoryError|No available memory for the cache blocks"
        r"|Free memory on device .* is less than|larger than the available KV cache|not enough GPU memory"
        r"|can(no|')t allocate memory|errno 12\b|std::bad_alloc|\bMemoryError\b",
        "raise `tensor_parallel`, lower `max_model_len`, or set `gpu-memory-utilization` in `engine_args`",
    ),
    _cause(
        "model-missing",
        r"is not a local folder and is not a valid model identifier|Repo id must|RepositoryNotFoundError"
        r"|401 Client Error|GatedRepoError|Invalid repository ID or local directory|LocalEntryNotFoundError"
        r"|OfflineModeIsEnabled|does not appear to have a file named|Cannot find any model weights"
        r"|Can't load the configuration|cannot find the requested files in the (disk|local) cache"
        r"|couldn't connect to 'https://huggingface\.co'",
        "give `model` as a path that every node can read, or download it on the login node first",
    ),
    _cause(
        "mpi",
        r"MPI\.Exception: MPI_ERR_\w+|OPAL ERROR|(ORTE|PRTE|PMIX)_ERROR_LOG|MPI_Init_thread.*(fail|error)"
        r"|not enough slots available in the system|detected an attempt to run as root",
        "TensorRT-LLM starts a worker for each GPU by MPI: is the Open MPI in its environment whole?",
        retry=True,
    ),
    _cause(
        "mpi",
        r"^error: \S+ has no \S+ on its PATH",
        "make the engine's launcher available on the nodes: `setup` of the site puts it on the PATH",
    ),
    _cause(
        "unknown",
        r"^error: the replica's server ended with status",
        "the lines before it in the replica's log may say why: `hpcserve logs --role ROLE`",
        retry=True,
    ),
    _cause(
        "mpi",
        # Of a rank that a signal ended, its launcher ends with the signal's number above 128.
        r"^srun: error: .*\btasks? [\d,-]+: (Killed|Terminated|Aborted|Segmentation fault"
        r"|Exited with exit code 1(34|35|37|39|43)$)",
        "one of the replica's ranks died, and the others with it; if it was killed, its node may have run "
        "out of memory: `sacct -o MaxRSS,State` tells",
        retry=True,
    ),
    _cause(
        "mpi",
        r"^srun: error: (Unable to create step|Task launch for StepId=.* failed|.*MPI plugin)",
        "Slurm gave the replica no step on its nodes: `sinfo -N` shows their state, and `srun --mpi=list` "
        "what `slurm.mpi` of the site can be",
        retry=True,
    ),
    _cause(
        "nixl",
        r"NIXL is not available|Please install NIXL|No module named 'nixl|NIXL compatibility hash mismatch"
        r"|NixlHandshakePayload|NixlAgentMetadata|nixl\w*Error|NIXL_ERR_\w+"
        r"|Remote NIXL agent engine ID mismatch|Cannot find .*backend UCX|\bucp_\w+.* failed"
        r"|kv_buffer is not supported",
        "KV transfer could not be set up; UCX's own lines are in the engine's log: "
        "look at `network.env` of the site",
    ),
    _cause(
        "bad-flag",
        r"Unknown quantization method|must be divisible by|does not recognize this architecture"
        r"|Model architectures .* are not supported",
        "the engine can't run this model with these settings: change model.yaml",
    ),
)

_SIGNALS = {
    -4: ("unknown", "died of SIGILL", "the engine was built for another processor"),
    -6: ("unknown", "aborted itself (SIGABRT)", "the engine's log has its last lines"),
    -7: ("out-of-memory", "died of SIGBUS", "/dev/shm of the node or container is probably too small"),
    -9: (
        "out-of-memory",
        "was killed (SIGKILL)",
        "the node probably ran out of memory: `sacct -o MaxRSS,State` tells; `slurm.memory` asks for more",
    ),
    -11: ("unknown", "crashed (SIGSEGV)", "the engine's log has its last lines"),
    -15: ("unknown", "was told to stop by somebody else (SIGTERM)", "`sacct -o State` may say why"),
}
_PREFIX = re.compile(
    r"^(\([^()]*pid=\d+\)\s*)?((INFO|WARNING|ERROR|CRITICAL|DEBUG)\s+)?([\d-]+[ T][\d:.,]+\s+)?"
    r"(\[[^\]]*\]\s*)?"
)
_NOISE = re.compile(
    r"^\s*$|^Traceback|^\s+\S|resource_tracker|leaked|DeprecationWarning|warnings\.warn"
    r"|^During handling|^The above exception|See root cause above|Engine core initialization failed"
    r"|Exception ignored"
)


def diagnose(log_tail: str, exit_status: int | None) -> Failure:
    """The first known cause in the tail; else the signal; else the last line that says something."""
    lines = [clean(line) for line in log_tail.splitlines()]
    for cause in CAUSES:
        for line in lines:
            if cause.pattern.search(line):
                return Failure(cause=cause.cause, message=line[:400], hint=cause.hint, retry=cause.retry)
    if exit_status in _SIGNALS:
        name, message, hint = _SIGNALS[exit_status]
        return Failure(cause=name, message=message, hint=hint, retry=True)
    last = next((line for line in reversed(lines) if line and not _NOISE.search(line)), "")
    ended = "it is still running" if exit_status is None else f"it ended with status {exit_status}"
    return Failure(
        cause="unknown",
        message=last[:400] or ended,
        hint="`hpcserve logs --role ROLE` shows the engine's whole log",
        retry=True,
    )


def clean(line: str) -> str:
    """A log line without process name, level, time and place."""
    return _PREFIX.sub("", line, count=1).rstrip() if not line.startswith(" ") else line.rstrip()
