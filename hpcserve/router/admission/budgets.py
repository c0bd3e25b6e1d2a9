"""How much work engines may hold: tokens of prompts to compute, and tokens in their KV caches.

Prompts: seconds of work, so that what was let in has its first token soon. Their pace is measured where it
shows, while requests are waiting here: then engines have all the work we allow them, and the tokens whose
first byte comes are what they can do. By Little's law a budget of pace times seconds makes the time in the
engine just these seconds: a budget too small is drained quicker, and so grows; one too large shrinks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..workers import Worker

UNMEASURED = 4.0
"""Engines that nobody has measured are taken to be this much quicker than the default says."""
_WINDOW = 4.0
_SURE = 1.0
"""Seconds of a sample that counts, however little was done."""
_FIRST_BYTES = 16
"""Requests in a sample that counts sooner, where there was none."""
_LEAST = 2.0
"""Requests in a sample: of long prompts not one may end in a whole window, and that is no pace of zero."""
_LONGEST = 60.0
"""Seconds that a window is stretched to for these."""
NEWEST = 0.02
"""Weight of one request in the means."""
_DOUBTED = 30.0
"""Seconds without a full queue after which the pace of then is no upper bound any more."""


class Pace:
    """Tokens a second, measured while more was wanted than could be done."""

    def __init__(self) -> None:
        self.measured: float | None = None
        self._samples: deque[tuple[float, float]] = deque()
        """Time and total, of the last seconds with somebody waiting."""
        self._pressed = 0.0

    def look(self, total: float, now: float, *, pressed: bool, mean: float) -> None:
        """`total` tokens were done up to `now`; `pressed`: somebody waits. `mean`: tokens of a request."""
        samples = self._samples
        if not pressed:
            samples.clear()
            if now - self._pressed > _DOUBTED:
                self.measured = None
            return
        self._pressed = now
        if samples and total < samples[-1][1]:
            samples.clear()  # a process that died took its part with it
        samples.append((now, total))
        # Much longer than a batch takes: what engines do comes in lumps.
        while now - samples[0][0] > _WINDOW and (
            total - samples[1][1] >= _LEAST * mean or now - samples[0][0] > _LONGEST
        ):
            samples.popleft()
        seconds, done = now - samples[0][0], total - samples[0][1]
        sure = seconds >= _SURE and done >= _LEAST * mean
        if sure or (seconds > 0.0 and done >= _FIRST_BYTES * mean and self.measured is None):
            self.measured = done / seconds


class Budgets:
    """What the engines may hold, in tokens."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        """Of work with prompts."""
        self.pace = Pace()
        self.workers = 0
        """That compute prompts."""
        self._declared = 0.0
        self.prompt_tokens = 512.0
        """Mean prompt."""
        self.tokens = 768.0
        """Mean prompt and answer."""
        self.prefill = 0.0
        """Tokens of prompts that may be waiting for their first byte."""
        self.kv: float | None = None
        """Tokens that KV caches hold; None: not every engine has said."""

    @property
    def rate(self) -> float:
        """Prompt tokens a second that all engines together compute."""
        return self._declared if self.pace.measured is None else self.pace.measured

    def seen(self, prompt_tokens: float, tokens: float) -> None:
        """A request's prompt, and prompt and answer, as estimated."""
        self.prompt_tokens += NEWEST * (max(prompt_tokens, 1.0) - self.prompt_tokens)
        self.tokens += NEWEST * (max(tokens, 1.0) - self.tokens)

    def look(self, computing: Sequence[Worker], answering: Sequence[Worker]) -> None:
        """Take over what is known about the workers, and the pace."""
        self.workers = len(computing)
        self._declared = 0.0
        for worker in computing:
            rate = worker.rates.prefill
            self._declared += rate if "prefill" in worker.rates.measured else rate * UNMEASURED
        kv = 0.0
        for worker in answering:
            if worker.facts is None or worker.facts.kv_tokens is None:
                self.kv = None
                break
            kv += worker.facts.kv_tokens
        else:
            self.kv = kv
        # One prompt computing and one waiting on each, or an engine would idle between two.
        least = 2.0 * self.workers * self.prompt_tokens
        self.prefill = max(self.rate * self._seconds, least)
