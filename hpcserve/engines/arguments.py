"""`engine_args` of model.yaml -> command-line flags of an engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ConfigError


def merge(role: str, common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Flag without dashes -> (key for messages, value); the pool's own `engine_args` win. `null` unsets."""
    merged: dict[str, tuple[str, Any]] = {}
    for where, args in (("engine_args", common), (f"{role}.engine_args", own)):
        for name, value in args.items():
            merged[name.lstrip("-").replace("_", "-")] = (f"{where}.{name}", value)
    return {flag: entry for flag, entry in merged.items() if entry[1] is not None}


def refuse(args: Mapping[str, tuple[str, Any]], reserved: Mapping[str, str], engine: str) -> None:
    """Raise ConfigError for a flag that hpcserve sets. `reserved`: flag -> what to use instead."""
    for flag, (key, _) in args.items():
        name = flag.split(".", 1)[0].removeprefix("no-")
        # Argument parsers take any unambiguous beginning of a flag's name.
        taken = next((other for other in reserved if name and other.startswith(name)), None)
        if taken is not None:
            raise ConfigError(
                f"{key}: hpcserve sets `--{taken}` of {engine} itself",
                hint=reserved[taken],
            )


def flags(args: Mapping[str, tuple[str, Any]], *, repeat_lists: bool = False) -> Iterator[str]:
    """true -> `--flag`, false -> `--no-flag`, mapping -> JSON, list -> `--flag A B` (or repeated)."""
    for flag, (key, value) in args.items():
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif isinstance(value, Mapping):
            yield from (f"--{flag}", compact(value))
        elif isinstance(value, list | tuple):
            items = [_scalar(item, key) for item in value]
            if repeat_lists:
                for item in items:
                    yield from (f"--{flag}", item)
            else:
                yield from (f"--{flag}", *items)
        else:
            text = _scalar(value, key)
            # A value such as -1 would be read as another flag.
            yield from ([f"--{flag}={text}"] if text.startswith("-") else [f"--{flag}", text])


def compact(value: Mapping[str, Any]) -> str:
    """JSON on one line; key order is kept."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _scalar(value: Any, key: str) -> str:
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    if "\x00" in text or "\n" in text:
        raise ConfigError(f"{key} must be on one line", hint="remove the line break")
    return text
