"""Runs inside vLLM, started by `--middleware hpcserve.engines.vllm_guard.JobKeyGuard`.

vLLM's own `--api-key` leaves /metrics, /tokenize, /health and others open.
"""

from __future__ import annotations

from .key_guard import KeyGuard


class JobKeyGuard(KeyGuard):
    """Asks for `$VLLM_API_KEY` on every path."""

    variable = "VLLM_API_KEY"
