"""How a trace is made small enough to be carried by a few cores, and how figures are made large again.

Three factors, all of them the same for every router: the clock runs `pace` times as fast as the trace's,
prompts have a `prompt`-th of their tokens and so has a KV block, answers have an `answer`-th of theirs and
each token takes `answer` times as long. Blocks stay blocks: a cache holds as many of them as it would.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..engine import EngineModel
from ..trace import BLOCK_TOKENS, TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    pace: float = 8.0
    prompt: int = 4
    """A divisor of 512. Beyond 4 a block would be smaller than what routers tell apart."""
    answer: int = 8

    @property
    def block_tokens(self) -> int:
        """Tokens of a live KV block."""
        return BLOCK_TOKENS // self.prompt

    def prompt_tokens(self, request: TraceRequest) -> int:
        tokens = max(round(request.prompt_tokens / self.prompt), 1)
        return min(tokens, len(request.blocks) * self.block_tokens)

    def answer_tokens(self, request: TraceRequest) -> int:
        return max(round(request.output_tokens / self.answer), 1)

    def arrival(self, request: TraceRequest) -> float:
        """Live seconds after the start."""
        return request.arrival / self.pace

    def prefill_rate(self, model: EngineModel) -> float:
        """Live prompt tokens a second."""
        return model.prefill_rate / self.prompt * self.pace

    def step_tokens(self, model: EngineModel) -> int:
        """Most live tokens of a step: it writes what `answer` steps write, so it computes as much."""
        return model.chunk * self.answer // self.prompt

    def step_base(self, model: EngineModel) -> float:
        """Live seconds of a step that writes tokens, without its prefill."""
        return model.step_base * self.answer / self.pace

    def step_per_answer(self, model: EngineModel) -> float:
        return model.step_per_answer * self.answer / self.pace

    def trace_seconds(self, live: float) -> float:
        """A time as the trace's clock would have it."""
        return live * self.pace

    def trace_itl(self, live: float) -> float:
        """The time of one token of the trace, from that of one live token."""
        return live * self.pace / self.answer
