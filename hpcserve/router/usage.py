"""What an engine counted for one answer, whatever its API calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec


class Usage(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None
    """Of the prompt; None: the engine does not say."""

    @classmethod
    def of(cls, told: Mapping[str, Any] | None) -> Usage | None:
        """From the `usage` of OpenAI's APIs, or of Anthropic's; None where there is no count in it."""
        if not told:
            return None
        prompt = _count(told.get("prompt_tokens", told.get("input_tokens")))
        if prompt is None:
            return None
        details = told.get("prompt_tokens_details") or told.get("input_tokens_details")
        cached = told.get("cache_read_input_tokens")
        if isinstance(details, dict):
            cached = details.get("cached_tokens")
        return cls(
            prompt_tokens=prompt,
            completion_tokens=_count(told.get("completion_tokens", told.get("output_tokens"))) or 0,
            cached_tokens=_count(cached),
        )


def _count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None
