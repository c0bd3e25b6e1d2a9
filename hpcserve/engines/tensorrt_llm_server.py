"""Starts TensorRT-LLM (1.2.1) with the job key, for which it has no place of its own.

`python -m hpcserve.engines.tensorrt_llm_server --served-model-name NAME MODEL FLAGS` takes the flags of
`trtllm-serve serve` and runs TensorRT-LLM's own server. Three things differ from that command:

- trtllm-serve knows no API key: whoever reaches its port is answered. Here every path asks for
  $TRTLLM_API_KEY.
- It calls its model by the last part of the path, whatever name clients use. Here it is told the name.
- What Slurm left in the environment is gone before MPI starts, which would take the whole job for the place
  to start workers in. TensorRT-LLM's own launcher removes it as well (llmapi/trtllm-llmapi-launch).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from .key_guard import KeyGuard, job_key

KEY_VARIABLE = "TRTLLM_API_KEY"
NAME_FLAG = "--served-model-name"


class JobKeyGuard(KeyGuard):
    """Asks for `$TRTLLM_API_KEY` on every path."""

    variable = KEY_VARIABLE


def guarded(server: type[Any], name: str) -> type[Any]:
    """TensorRT-LLM's OpenAIServer behind the guard, with its model called `name`."""

    class Guarded(server):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.model = name
            # What is added last is asked first.
            self.app.add_middleware(JobKeyGuard)

    return Guarded


def main(argv: Sequence[str] | None = None) -> None:
    """Until the server ends, and then the process with it. Raises RuntimeError without a key, or where
    TensorRT-LLM's server is not where it is in 1.2.1: another one would answer to anybody."""
    job_key(KEY_VARIABLE)
    flag, name, *flags = sys.argv[1:] if argv is None else argv
    if flag != NAME_FLAG:
        raise RuntimeError(f"the command line must begin with {NAME_FLAG}")
    for variable in [variable for variable in os.environ if variable.startswith("SLURM_")]:
        del os.environ[variable]
    # Only now, and not in its workers, which MPI starts from this module: it starts MPI.
    commands = import_module("tensorrt_llm.commands.serve")
    if not hasattr(commands, "OpenAIServer"):
        raise RuntimeError("tensorrt_llm.commands.serve has no OpenAIServer to guard: is this version 1.2?")
    vars(commands)["OpenAIServer"] = guarded(commands.OpenAIServer, name)
    commands.main(args=["serve", *flags], prog_name="trtllm-serve")


if __name__ == "__main__":
    main()
