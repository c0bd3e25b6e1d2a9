"""The file of one run's usage: lines of JSON that are only ever appended.

A line is the state of one figure, not a difference: of several lines about the same hour and key the last one
counts. So a line that is lost, cut or written twice does no harm once the next one is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from ...errors import StorageError
from ...rundir.atomic import storage_error

SUFFIX = ".jsonl"
HOUR = 3600


class UsageConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where usage is written down, and what it is that is used."""

    directory: str
    run: str
    """The run's id: the file's name."""
    gpus: int = 0
    """Of the whole run."""
    started: float | None = None
    """When the job started, as a Unix time; None: now."""


class Used(msgspec.Struct, kw_only=True, tag_field="kind", tag="used"):
    """What one key used of one model in one hour."""

    hour: int
    """Its first second, as a Unix time."""
    key: str
    name: str
    model: str
    requests: int = 0
    prompt: int = 0
    cached: int = 0
    """Of `prompt`: what the engine had in its prefix cache."""
    completion: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt + self.completion


class Time(msgspec.Struct, kw_only=True, tag_field="kind", tag="time"):
    """How long the run held its GPUs in one hour."""

    hour: int
    gpus: int
    until: float
    """The last moment that is counted, as a Unix time."""
    up: float = 0.0
    """Seconds."""
    busy: float = 0.0
    """Of these: seconds with a request."""


_decoder: msgspec.json.Decoder[Used | Time] = msgspec.json.Decoder(Used | Time)


class RunUsage:
    """All figures of one run."""

    def __init__(self) -> None:
        self.used: dict[tuple[int, str, str], Used] = {}
        """By hour, key and model."""
        self.times: dict[int, Time] = {}
        """By hour."""

    def take(self, line: Used | Time) -> None:
        if isinstance(line, Used):
            self.used[line.hour, line.key, line.model] = line
        else:
            self.times[line.hour] = line

    def lines(self) -> Iterator[Used | Time]:
        yield from self.times.values()
        yield from self.used.values()

    def totals(self) -> dict[str, int]:
        """Tokens by key id."""
        totals: dict[str, int] = {}
        for used in self.used.values():
            totals[used.key] = totals.get(used.key, 0) + used.tokens
        return totals


def encode(lines: Iterable[Used | Time]) -> bytes:
    return b"".join(msgspec.json.encode(line) + b"\n" for line in lines)


def read(path: Path) -> tuple[RunUsage, list[str]]:
    """A run's figures, and a warning for each thing that was passed over.

    Raises FileNotFoundError and StorageError.
    """
    usage, warnings = RunUsage(), []
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise storage_error(error, "read the usage in") from error
    lines = data.split(b"\n")
    if lines.pop():
        warnings.append(f"{path}: the last line is cut off; the last seconds before a crash may be missing")
    bad = 0
    for line in lines:
        try:
            if line:
                usage.take(_decoder.decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            bad += 1
    if bad:
        warnings.append(f"{path}: {bad} of {len(lines)} lines are not understood and not counted")
    return usage, warnings


def read_all(directory: Path) -> tuple[dict[str, RunUsage], list[str]]:
    """The usage of every run in a directory, by run id, and what is wrong with it. No directory: no runs."""
    found: dict[str, RunUsage] = {}
    warnings: list[str] = []
    try:
        paths = sorted(directory.glob(f"*{SUFFIX}"))
    except OSError as error:
        raise storage_error(error, "list the usage in") from error
    for path in paths:
        try:
            found[path.name.removesuffix(SUFFIX)], told = read(path)
            warnings += told
        except FileNotFoundError:
            continue
        except StorageError as error:
            warnings.append(error.message)
    return found, warnings
