"""Who a request comes from, and what that key may do."""

from __future__ import annotations

from dataclasses import dataclass

from ...http.errors import HttpError

INTERACTIVE = 0
BATCH = -1
PRIORITIES = {"interactive": INTERACTIVE, "batch": BATCH}
"""Priority classes by name; a higher number goes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one key may use; None: as much as there is."""

    concurrent: int | None = None
    """Requests at one time."""
    tokens_per_minute: int | None = None
    """Tokens of prompts and answers."""
    tokens_total: int | None = None
    """Tokens of prompts and answers over the life of the key, in all runs."""
    models: frozenset[str] | None = None


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One key."""

    key: str = ""
    """Its public id; `run` for the run's own key, and "" where no key is asked for."""
    name: str = ""
    """Whose it is; several keys may have one name. `run` and "" as above."""
    priority: int = INTERACTIVE
    weight: float = 1.0
    """Its part of a busy endpoint, next to the other keys' weights."""
    limits: Limits = NO_LIMITS

    def check_model(self, model: str) -> None:
        """Raises HttpError 403 when the key may not use `model`."""
        allowed = self.limits.models
        if allowed is not None and model not in allowed:
            raise HttpError(
                403,
                f"this key may not use the model {model[:200]!r}; allowed: {', '.join(sorted(allowed))}",
                headers=((b"x-hpcserve-reason", b"model_not_allowed"),),
                code="model_not_allowed",
            )


ANYONE = Identity()
"""Everyone, on an endpoint without keys."""
RUN = Identity(key="run", name="run")
"""Who has the run's own key."""
