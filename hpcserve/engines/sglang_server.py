"""Starts SGLang (0.5.23) with the job key, which must not be in a command line that everybody can read.

`python -m hpcserve.engines.sglang_server FLAGS` takes SGLang's own flags and runs SGLang's own server. Three
things differ from `python -m sglang.launch_server`:

- SGLang takes its API key from its arguments alone. Here it comes from $SGLANG_API_KEY.
- That key leaves /health, /ready and /metrics open (utils/auth.py); a guard before it does not.
- Servers that the guard would not stand before (Rust, gRPC) are not started by variables left in the
  environment. Their flags are reserved in `sglang.py`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from . import sglang_host_kv
from .key_guard import KeyGuard, job_key

KEY_VARIABLE = "SGLANG_API_KEY"
OPEN_DOORS = ("SGLANG_RUST_SERVER", "SGLANG_GRPC_PORT")
"""Variables that start servers which know no key (environ.py)."""


class JobKeyGuard(KeyGuard):
    """Asks for `$SGLANG_API_KEY` on every path."""

    variable = KEY_VARIABLE


class Secret(str):
    """A key that is not written where arguments are: SGLang logs all of its own at the start."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'…'"


def main(argv: Sequence[str] | None = None) -> None:
    """Until the server ends. Raises RuntimeError without a key, or without a plugin that it needs."""
    key = Secret(job_key(KEY_VARIABLE))
    sglang_host_kv.check()
    for name in OPEN_DOORS:
        os.environ.pop(name, None)
    # Only now, and not in the processes that SGLang spawns from this module: it takes seconds.
    from sglang.launch_server import run_server
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    server_args = prepare_server_args(list(sys.argv[1:] if argv is None else argv))
    # For the requests SGLang sends to itself before it is ready. Its own middleware asks for it as well.
    server_args.api_key = key
    app.add_middleware(JobKeyGuard)
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
