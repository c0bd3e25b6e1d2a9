"""argparse with this project's errors: one UsageError, and the flag that was probably meant."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import UsageError


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations: a script that uses one breaks when a flag is added."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args(list(argv))
        if unknown:
            raise self._unknown(unknown[0])
        return args

    def error(self, message: str) -> NoReturn:
        # "argument --nodes: invalid int value: 'x'" -> "--nodes: …"
        raise UsageError(re.sub(r"^argument ", "", message), hint=f"see `{self.prog} --help`")

    def _unknown(self, word: str) -> UsageError:
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        near = difflib.get_close_matches(word.partition("=")[0], flags, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"see `{self.prog} --help`"
        what = "option" if word.startswith("-") else "argument"
        return UsageError(f"`{self.prog}` has no {what} {word!r}", hint=hint)


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def add_run(parser: Parser) -> None:
    """The argument that names a run."""
    parser.add_argument("run", metavar="RUN", help="a run's name, its beginning, or a job id")


def add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
