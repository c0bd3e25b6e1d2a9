"""What a policy answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from ..demand import Demand
from .decision import Shown
from .view import View

if TYPE_CHECKING:
    from ..workers import Worker


class Choice(msgspec.Struct, frozen=True):
    answering: Worker
    prefill: Worker | None
    """None: the answering worker computes the prompt."""
    uncached: int
    """Prompt tokens to compute."""
    reason: str = ""
    shown: Shown | None = None


class Policy(Protocol):
    """A way to choose. It may keep state."""

    def choose(
        self, demand: Demand, answering: Sequence[Worker], prefill: Sequence[Worker], view: View
    ) -> Choice:
        """From `answering`, which is not empty, and, unless that is empty, `prefill`."""
        ...
