"""`hpcserve COMMAND …`: finds the command's module, runs it, and turns errors into exit codes."""

from __future__ import annotations

import difflib
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import HpcserveError, UsageError
from .output import report

if TYPE_CHECKING:
    from .arguments import Parser

COMMANDS = {
    "launch": "start an endpoint: plan, submit, and wait until it is READY",
    "batch": "send a dataset through a model; goes on after any stop",
    "batch calibrate": "measure which layout answers a dataset faster",
    "batch convert": "write a batch's results as a table of another format",
    "ls": "list your runs",
    "status": "show how one run is doing",
    "logs": "print or follow the logs of a run",
    "connect": "print how to reach a run's endpoint",
    "chat": "ask a run's endpoint a question",
    "key": "make, list and revoke keys for those who share your endpoints",
    "usage": "print tokens and GPU-hours by user, key, model or run",
    "stop": "drain and end a run; a second time: at once",
    "explain": "show what a launch would derive, and from where",
    "render": "print the job script of a launch",
    "why-route": "print why requests went to the workers they went to",
    "image pull": "fetch a site's container image from its registry",
    "router": "run the router alone, for engines that someone else started",
    "bench": "measure the router against its peers, or on a trace",
}
"""Each is a module of this package with `add_arguments(parser)` and `run(args) -> int`."""

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; see errors.py for the numbers."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal of another encoding gets `?` for what it can't show, not a traceback.
        sys.stdout.reconfigure(errors="replace")
    try:
        status = _run(words)
        sys.stdout.flush()  # here, where a closed pipe can still be answered
        return status
    except HpcserveError as error:
        if debug:
            raise
        report(error)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # `hpcserve ls | head -1`: nobody reads any more. stdout must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED


def _run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview(), end="")
        return 0
    if words[0] in ("-V", "--version"):
        from .. import __version__

        print(f"hpcserve {__version__}")
        return 0
    two = " ".join(words[:2])
    command = two if two in COMMANDS else words[0]
    if command not in COMMANDS:
        raise _unknown(command)
    parser = parser_for(command)
    try:
        args = parser.parse(words[len(command.split()) :])
    except SystemExit as stop:  # argparse's --help
        return int(stop.code or 0)
    args.command_line = ("hpcserve", *words)  # for run.json
    status: int = import_module(_module(command), __package__).run(args)
    return status


def parser_for(command: str) -> Parser:
    """The parser of one command; the reference in docs/ is generated from these."""
    from .arguments import Parser

    module = import_module(_module(command), __package__)
    parser = Parser(prog=f"hpcserve {command}", description=module.__doc__)
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    return parser


def _module(command: str) -> str:
    return "." + command.replace("-", "_").replace(" ", "_")


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:<{width}}{summary}" for name, summary in COMMANDS.items())
    return (
        "usage: hpcserve COMMAND …\n\n"
        "Serve large language models from a Slurm job.\n\n"
        f"commands:\n{commands}\n\n"
        "options:\n"
        "  --help     this text; `hpcserve COMMAND --help` for one command\n"
        "  --version  print the version\n"
        "  --debug    show a traceback with an error\n\n"
        "begin with: hpcserve launch --dry-run --nodes 2 model.yaml\n"
    )


def _unknown(word: str) -> UsageError:
    if word.startswith("-"):
        return UsageError(f"hpcserve has no option {word!r} before the command", hint="see `hpcserve --help`")
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f"did you mean `hpcserve {near[0]}`?" if near else "see `hpcserve --help`"
    return UsageError(f"hpcserve has no command {word!r}", hint=hint)
