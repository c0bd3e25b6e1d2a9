"""What a request will cost, estimated before any engine has seen it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Demand(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Tokens are estimates: the router never tokenizes a prompt."""

    prompt_tokens: int
    output_tokens: int
    """Expected length of the answer; never above what the request allows."""
    chain: Sequence[int] = ()
    """One 64-bit hash per chunk of the prompt, each over all before it; () when nothing can be reused."""
    chunk_tokens: float = 0.0
    """Tokens in one chunk of `chain`."""
    session: str | None = None
    """Requests of one session should meet the same caches."""
    priority: int = 0
    """Higher goes first: 0 is interactive, negative is batch."""
    model: str = ""
    """As the request names it: a served model or a LoRA."""
    prompt_bytes: int = 0
    """JSON bytes that `prompt_tokens` was estimated from; 0: it was not an estimate by length."""
    space: int | None = None
    """Seed of the prompt's token units (`engines/kv_events/units.py`); None: tokens alone don't tell
    what is cached, as for a prompt with images."""
