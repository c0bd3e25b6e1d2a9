"""Template filters: every value goes into a script through one of these."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

from ..errors import ConfigError

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SAFE_DIRECTIVE = re.compile(r"[A-Za-z0-9_@%+=:,./&|*()\[\]<>!~^?-]+")
_VARIABLE = re.compile(r"\$(?:[A-Za-z_][A-Za-z0-9_]*|\{[A-Za-z_][A-Za-z0-9_]*\})")


class Expanding(str):
    """Text whose `$NAME` and leading `~/` the job's shell fills in; all else in it stays as it is."""

    __slots__ = ()


def quote(value: object) -> str:
    """One shell word."""
    text = str(value)
    _refuse_control(text)
    return _expanding(text) if isinstance(value, Expanding) else shlex.quote(text)


def words(values: Iterable[object]) -> str:
    """Several shell words."""
    return " ".join(quote(value) for value in values)


def directive(value: object) -> str:
    """One option of an #SBATCH line: sbatch splits those at blanks, knows quotes and no variables."""
    text = str(value)
    _refuse_control(text)
    if _SAFE_DIRECTIVE.fullmatch(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def comment(value: object) -> str:
    """Text behind a `#`."""
    return _CONTROL.sub(" ", str(value))


def _expanding(text: str) -> str:
    if text.startswith("~/"):
        text = "$HOME" + text[1:]
    done, out = 0, []
    for match in _VARIABLE.finditer(text):
        out += [literal(text[done : match.start()]), match.group()]
        done = match.end()
    out.append(literal(text[done:]))
    return '"' + "".join(out) + '"'


def literal(text: str) -> str:
    """Text for between double quotes."""
    return re.sub(r'([\\"$`])', r"\\\1", text)


def _refuse_control(text: str) -> None:
    if _CONTROL.search(text):
        raise ConfigError(
            f"{text!r} has a line break or another control character, which can't go into a job script",
            hint="write the value on one line; only `setup.script` of a site may have several",
        )
