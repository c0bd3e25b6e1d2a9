"""Programs that run inside the job: `python -m hpcserve.node PROGRAM --run-dir DIR`.

PROGRAM is one of rendezvous, preflight, stage, head, agent and close.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..errors import HpcserveError
from ..plan.plan import RENDEZVOUS_TIMEOUT
from .console import say
from .inputs import load_inputs


def main(argv: list[str] | None = None) -> int:
    """Run one of the programs. The exit status is the error's exit_code; 75 asks for another transport."""
    options = _parser().parse_args(argv)
    try:
        inputs = load_inputs(options.run_dir)
        os.umask(0o027 if inputs.plan.model.group else 0o077)
        if options.program == "rendezvous":
            from .rendezvous.run import run_rendezvous

            run_rendezvous(inputs, transport=options.transport, timeout=options.timeout)
            return 0
        if options.program == "preflight":
            from .preflight.run import run_preflight

            return run_preflight(inputs)
        if options.program == "stage":
            from .staging.run import run_stage

            return run_stage(inputs)
        if options.program == "head":
            from .head.head import run_head

            return run_head(inputs)
        if options.program == "close":
            from .head.closing import close_log

            close_log(inputs, stage=options.stage, status=options.status, signalled=options.signalled)
            return 0
        from .agent.agent import run_agent

        return run_agent(inputs)
    except HpcserveError as error:
        say(error.report())
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hpcserve.node", description=__doc__)
    programs = parser.add_subparsers(dest="program", required=True)
    for name in ("rendezvous", "preflight", "stage", "head", "agent", "close"):
        program = programs.add_parser(name)
        program.add_argument(
            "--run-dir",
            type=Path,
            default=os.environ.get("HPCSERVE_RUN_DIR"),
            required="HPCSERVE_RUN_DIR" not in os.environ,
        )
        if name == "rendezvous":
            program.add_argument("--transport", choices=("mpi", "tcp", "file"))
            program.add_argument(
                "--timeout", type=float, default=RENDEZVOUS_TIMEOUT, help="seconds to wait for all ranks"
            )
        if name == "close":
            stages = ("stop-file", "batch-check", "rendezvous", "preflight", "staging", "serving")
            program.add_argument("--stage", choices=stages, required=True, help="how far the job came")
            program.add_argument("--status", type=int, required=True, help="the job script's exit status")
            program.add_argument("--signalled", action="store_true", help="the job script was told to end")
    return parser


if __name__ == "__main__":
    sys.exit(main())
