"""What TensorRT-LLM's log lines say: progress while it loads, the cause when it died."""

# Log lines are quoted whole.
# ruff: noqa: E501
from __future__ import annotations

import pytest

from hpcserve import engines

TENSORRT = engines.get("tensorrt-llm")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("Loading safetensors weights in parallel: 100%|##########| 4/4 [00:12<00:00,  3.05s/it]", "weights 4/4"),
        ("Loading weights:  50%|#####     | 400/801 [00:00<00:01, 700.62it/s]", "layers 400/801"),
        ("[11/21/2026-01:23:48] [TRT-LLM] [I] Prefetching 15.00GB checkpoint files.", "reading 15.00GB of weights"),
        ("Model init total -- 3.13s", "model initialised in 3.13 s"),
        ("INFO:     Application startup complete.", "answering"),
        ('INFO:     10.0.0.1:5 - "GET /health HTTP/1.1" 200 OK', None),
    ],
)  # fmt: skip
def test_progress(line: str, says: str | None) -> None:
    assert TENSORRT.progress(line) == says


@pytest.mark.parametrize(
    ("tail", "cause", "retry", "hint"),
    [
        ("Usage: trtllm-serve serve [OPTIONS] MODEL\nError: No such option: --tool_parsers", "bad-flag", False, "engine_args"),
        ("Error: Invalid value for '--tool_parser': 'x' is not one of 'qwen3'", "bad-flag", False, "engine_args"),
        ("pydantic_core._pydantic_core.ValidationError: 1 validation error for TorchLlmArgs\nmax_batch\n  Extra inputs are not permitted [type=extra_forbidden]",
         "bad-flag", False, "engine_args"),
        ("RuntimeError: Failed to bind socket to 10.0.0.1:20001: [Errno 98] Address already in use", "port-taken", True, "another"),
        ("mpi4py.MPI.Exception: MPI_ERR_UNKNOWN: unknown error", "mpi", True, "Open MPI"),
        ("prte has detected an attempt to run as root.", "mpi", True, "Open MPI"),
        ("srun: error: n3: task 2: Killed\nsrun: launch/slurm: _step_signal: Terminating StepId=7.3", "mpi", True, "ranks died"),
        ("srun: error: n3: task 2: Exited with exit code 137\nsrun: error: n4: tasks 0-1: Exited with exit code 143", "mpi", True, "ranks died"),
        ("error: n3 has no trtllm-llmapi-launch on its PATH\nsrun: error: n3: task 2: Exited with exit code 127", "mpi", False, "PATH"),
        ("srun: error: Unable to create step for job 7: Requested nodes are busy", "mpi", True, "sinfo"),
        ("There are not enough slots available in the system to satisfy the 8", "mpi", True, "Open MPI"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "out-of-memory", False, "tensor_parallel"),
    ],
)  # fmt: skip
def test_causes(tail: str, cause: str, retry: bool, hint: str) -> None:
    found = TENSORRT.diagnose(tail, 1)
    assert (found.cause, found.retry) == (cause, retry)
    assert hint in found.hint
