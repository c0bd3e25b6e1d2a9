"""Whether a worker that failed may be asked again."""

from __future__ import annotations

from typing import Literal

_FIRST = 2.0
_LONGEST = 30.0
PROBATION = 3.0
"""Seconds others are preferred to a prefill worker that was restarted: its peers may hold what they knew
of the engine before it, and a decode engine that pulls by that can crash."""

State = Literal["closed", "open", "half-open"]


class Breaker:
    """Opens at a failure, for twice as long each time; then lets one request through, which decides.

    While it is open a worker is avoided, not excluded: with nobody else left it is asked all the same.
    Times are the event loop's seconds.
    """

    __slots__ = ("_handover", "_pause", "_probing", "avoid_until")

    def __init__(self) -> None:
        self._pause = _FIRST
        self.avoid_until = 0.0
        """When the worker is worth a try again; 0.0 while nothing is wrong with it."""
        self._probing = False
        self._handover = False

    def state(self, now: float) -> State:
        if self.avoid_until == 0.0:
            return "closed"
        return "half-open" if self._probing or self.avoid_until <= now else "open"

    def asked(self, now: float) -> None:
        """A request goes to the worker. The first one after a pause is the probe; others wait for its end."""
        if self.avoid_until and self.avoid_until <= now:
            self._probing = True
            self.avoid_until = now + self._pause

    def succeeded(self) -> None:
        """The worker's first byte came."""
        if self.avoid_until and not self._handover:
            self.avoid_until = 0.0
            self._pause = _FIRST
            self._probing = False

    def handed_over(self) -> None:
        """A decode worker has answered with KV from this one."""
        if self._handover:
            self._handover = False
            self.succeeded()

    def failed(self, now: float) -> None:
        if self.avoid_until > now and not self._probing:
            # One death fails all requests of a worker: it counts once.
            return
        self.avoid_until = now + self._pause
        self._pause = min(self._pause * 2, _LONGEST)
        self._probing = False

    def probation(self, now: float) -> None:
        """Prefer others for a few seconds, then let one request show that all is well, to the end of it."""
        self.avoid_until = now + PROBATION
        self._handover = True
        self._probing = False
