"""Failures on command: `--fail SPEC` and `POST /fake/fail`.

A spec is `MODE` or `MODE:KEY=VALUE,…`; the request's body is the same as a JSON object with `mode`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

CRASH_STATUS = 139

MODES: Mapping[str, frozenset[str]] = {
    "crash": frozenset(),
    "crash_after": frozenset({"requests", "tokens"}),
    "hang": frozenset(),
    "slow": frozenset({"factor"}),
    "hold": frozenset({"tokens", "spread"}),
    "release": frozenset(),
    "refuse": frozenset(),
    "drop_transfer": frozenset({"count"}),
    "exit_at_start": frozenset({"cause"}),
    "never_ready": frozenset(),
    "reset": frozenset(),
}

START_FAILURES: Mapping[str, str] = {
    "port-taken": "OSError: [Errno 98] Address already in use",
    "oom": (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity"
        " of 79.11 GiB of which 1.12 GiB is free."
    ),
    "model-missing": (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, Invalid repository ID or local directory specified: '{model}'.\n"
        "Please verify the following requirements:\n"
        "1. Provide a valid Hugging Face repository ID.\n"
        "2. Specify a local directory that contains a recognized configuration file."
    ),
    "disk-full": "OSError: [Errno 28] No space left on device: '/tmp/torch_compile_cache'",
}


def parse_spec(spec: str) -> dict[str, Any]:
    """`slow:factor=4` as a command. Raises ValueError with a sentence."""
    mode, _, rest = spec.partition(":")
    command: dict[str, Any] = {"mode": mode}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--fail {spec}: expected KEY=VALUE, found '{item}'")
        command[key] = value
    return command


class Failures:
    """What is broken now. `die` ends the process at once; tests replace it."""

    def __init__(self, die: Callable[[int], Any] = os._exit) -> None:
        self._die = die
        self.reset()

    def reset(self) -> None:
        """All is well again."""
        self.hang = False
        self.refuse = False
        self.never_ready = False
        self.start_failure: str | None = None
        self.slow_factor = 1.0
        self._hold: tuple[int, int] | None = None
        self._drops = 0
        self._requests_left: int | None = None
        self._tokens_left: int | None = None

    def apply(self, command: Mapping[str, Any]) -> None:
        """Obey one command. Raises ValueError naming the allowed values."""
        mode = str(command.get("mode"))
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; allowed: {', '.join(sorted(MODES))}")
        unknown = set(command) - {"mode"} - MODES[mode]
        if unknown:
            raise ValueError(f"mode '{mode}' does not take {', '.join(sorted(unknown))}")
        match mode:
            case "crash":
                self._die(CRASH_STATUS)
            case "crash_after":
                self._crash_after(command)
            case "hang":
                self.hang = True
            case "slow":
                self.slow_factor = _positive(command, "factor", float)
            case "hold":
                spread = _positive(command, "spread", int) if "spread" in command else 0
                self._hold = (_positive(command, "tokens", int), spread + 1)
            case "release":
                self._hold = None
            case "refuse":
                self.refuse = True
            case "drop_transfer":
                self._drops = _positive(command, "count", int) if "count" in command else 1
            case "exit_at_start":
                self.start_failure = self._cause(command)
            case "never_ready":
                self.never_ready = True
            case "reset":
                self.reset()

    def request_arrived(self) -> None:
        """Counts down `crash_after requests=N`: N are served, the next kills the process."""
        if self._requests_left is not None:
            self._requests_left -= 1
            if self._requests_left < 0:
                self._die(CRASH_STATUS)

    def token_sampled(self) -> None:
        """Counts down `crash_after tokens=N`: token N + 1 kills the process."""
        if self._tokens_left is not None:
            self._tokens_left -= 1
            if self._tokens_left < 0:
                self._die(CRASH_STATUS)

    def holds(self, number: int, tokens: int) -> bool:
        """Whether the `number`th answer, which has `tokens`, waits.

        `hold tokens=N,spread=K` lets each go on to N, N + 1, … or N + K tokens by turns, until `release`.
        """
        if self._hold is None:
            return False
        least, turns = self._hold
        return tokens >= least + number % turns

    def drops_transfer(self) -> bool:
        """True for the next N transfers after `drop_transfer count=N`."""
        if self._drops == 0:
            return False
        self._drops -= 1
        return True

    def _crash_after(self, command: Mapping[str, Any]) -> None:
        if "requests" in command:
            self._requests_left = _positive(command, "requests", int)
        elif "tokens" in command:
            self._tokens_left = _positive(command, "tokens", int)
        else:
            raise ValueError("mode 'crash_after' needs requests or tokens")

    @staticmethod
    def _cause(command: Mapping[str, Any]) -> str:
        cause = str(command.get("cause"))
        if cause not in START_FAILURES:
            raise ValueError(f"unknown cause {cause!r}; allowed: {', '.join(sorted(START_FAILURES))}")
        return cause


def _positive(command: Mapping[str, Any], key: str, kind: type[int] | type[float]) -> Any:
    try:
        value = kind(command[key])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{key} must be a positive number") from None
    if value < 0:
        raise ValueError(f"{key} must be a positive number")
    return value
