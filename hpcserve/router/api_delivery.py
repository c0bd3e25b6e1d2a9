"""Answers of /v1/responses and /v1/messages on their way to a client: counted, and remembered by their id."""

from __future__ import annotations

import re
from typing import Any

from ..http.response import UpstreamResponse
from .call import Call
from .held import Holders
from .metrics import Metrics
from .relay import ClientDelivery

_ID = re.compile(rb'"id"\s*:\s*"(resp_[A-Za-z0-9_.\-]{1,200})"')
_LOOK_IN = 4096
"""An answer's id is in its first bytes."""
# Inside an answer's text the quotes would be escaped.
_COUNTS = re.compile(
    rb'"(input_tokens|output_tokens|cached_tokens|cache_read_input_tokens)"\s*:\s*([0-9]{1,12})'
)


class ApiDelivery(ClientDelivery):
    """Hands the answer on as it comes. Streams of these APIs name their usage without being asked to."""

    def __init__(self, call: Call, metrics: Metrics, holders: Holders) -> None:
        super().__init__(call, metrics)
        self._asking = call
        self._holders = holders
        self._counts: dict[str, Any] = {}
        self._pass_events = call.exchange.write
        self.events_to = self._count

    async def deliver(self, response: UpstreamResponse, first: bytes) -> None:
        found = _ID.search(first, 0, _LOOK_IN)
        if found is not None and self._asking.decisions:
            self._holders.keep(found[1].decode(), self._asking.decisions[-1].answering)
        await super().deliver(response, first)

    def _count(self, events: bytes) -> None:
        if b'"usage"' in events:
            for name, count in _COUNTS.findall(events):
                # The last word counts: a stream's first event has no answer yet.
                self._counts[name.decode()] = int(count)
        self._pass_events(events)

    @property
    def usage(self) -> dict[str, Any] | None:
        counted = dict(self._counts)
        if "cached_tokens" in counted:
            counted["input_tokens_details"] = {"cached_tokens": counted["cached_tokens"]}
        return counted or super().usage
