"""Request traces in the Mooncake format.

One JSON object a line: `timestamp` (ms), `input_length` and `output_length` (tokens), `hash_ids` (one id per
block of 512 tokens; an id stands for its block and all blocks before it). Defined in
github.com/kvcache-ai/Mooncake, FAST25-release. `session_id` is an extension some generators write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from ...errors import StorageError, UsageError

BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One line of a trace."""

    arrival: float
    """Seconds after the trace's start."""
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    session: str | None = None


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]
    session_id: str | int | None = None


def read(path: Path, *, limit: int | None = None, speed: float = 1.0) -> list[TraceRequest]:
    """The trace at `path`, in order of arrival; `speed` 2 plays it in half the time.

    Raises StorageError where the file can't be read, UsageError for a line that is not of the format.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise StorageError(
            f"the trace {path} can't be read: {error.strerror}",
            hint="Mooncake's traces are in github.com/kvcache-ai/Mooncake under FAST25-release/traces.",
        ) from error
    decoder = msgspec.json.Decoder(_Line)
    found = []
    for number, text in enumerate(lines[:limit], start=1):
        if not text.strip():
            continue
        try:
            line = decoder.decode(text)
        except msgspec.DecodeError as error:
            raise UsageError(
                f"{path}:{number}: not a line of a Mooncake trace: {error}",
                hint="Each line has timestamp (ms), input_length, output_length and hash_ids.",
            ) from error
        found.append(
            TraceRequest(
                arrival=line.timestamp / 1e3,
                prompt_tokens=max(line.input_length, 1),
                output_tokens=max(line.output_length, 1),
                blocks=tuple(line.hash_ids),
                session=None if line.session_id is None else str(line.session_id),
            )
        )
    if not found:
        raise UsageError(f"{path}: no request in this trace", hint="Each line of a trace is one request.")
    return sped(sorted(found, key=lambda request: request.arrival), speed)


def sped(trace: Sequence[TraceRequest], speed: float) -> list[TraceRequest]:
    """The same requests, `speed` times as close to each other."""
    if speed == 1.0:
        return list(trace)
    return [replace(request, arrival=request.arrival / speed) for request in trace]
