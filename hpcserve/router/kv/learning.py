"""Learns prompts' tokens after their first bytes have gone to the clients, and not all at once."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING

from .residency import Residency

if TYPE_CHECKING:
    from ..demand import Demand

log = logging.getLogger(__name__)

_PAUSE = 0.02
"""Seconds after which the next prompt is looked at: other requests' first bytes go before."""
_MOST = 8 << 20
"""Bytes of ids that wait; beyond, the oldest are not learned from, and the next request with them is."""


class Learning:
    """One per Residency; in its event loop."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._waiting: deque[tuple[Demand, bytes]] = deque()
        self._size = 0
        """Bytes of their ids."""
        self._timer: asyncio.TimerHandle | None = None

    def put(self, demand: Demand, prompt_token_ids: bytes | memoryview) -> None:
        """The ids as in a JSON array, without its brackets. Costs a few microseconds now."""
        if demand.chain and demand.space is not None and self._residency.hears:
            self._waiting.append((demand, bytes(prompt_token_ids)))
            self._size += len(prompt_token_ids)
            while self._size > _MOST:
                self._take()
            if self._waiting and self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(_PAUSE, self._next)

    def _take(self) -> tuple[Demand, bytes]:
        demand, prompt_token_ids = self._waiting.popleft()
        self._size -= len(prompt_token_ids)
        return demand, prompt_token_ids

    def _next(self) -> None:
        self._timer = None
        if not self._waiting:
            return
        demand, prompt_token_ids = self._take()
        try:
            self._residency.learn(demand, prompt_token_ids)
        except ValueError as error:
            log.warning("an engine's %s", error)
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(_PAUSE / 10, self._next)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._waiting.clear()
        self._size = 0
