"""What a prefill worker's answer leaves to do: a decode leg, or nothing, where the answer ended with it."""

from __future__ import annotations

import msgspec

from ..engines.base import Engine
from ..http.errors import Header
from ..http.response import UpstreamResponse
from .legs import Delivery, LegFailure, Onward, refusal
from .metrics import Metrics
from .stream.asked import Fields
from .workers import Worker

UNREADABLE = (KeyError, AttributeError, msgspec.DecodeError)


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """Of one request."""

    body: bytes = b""
    """For the decode leg."""
    answer: bytes | None = None
    """The client's, whole: there is no decode leg."""
    headers: list[Header] = []
    """The answer's."""

    async def deliver(self, delivery: Delivery) -> None:
        """Pass the answer on, as if an engine had sent it."""
        assert self.answer is not None, "there is a decode leg"
        response = UpstreamResponse(None)
        response.head(200, self.headers)
        response.end(self.answer)
        await delivery.deliver(response, await response.next_chunk())


def read(engine: Engine, metrics: Metrics, body: Fields, answer: bytes, *, stream: bool) -> Handover:
    """`answer` is a prefill worker's to the request with `body`.

    Raises what UNREADABLE names where it kept no KV blocks.
    """
    response = msgspec.json.decode(answer)
    early = engine.early_answer(response, stream=stream)
    if early is not None:
        metrics.kv_legs.add(("result", "none"))
        kind = b"text/event-stream; charset=utf-8" if stream else b"application/json"
        headers = [(b"content-type", kind)]
        if not stream:
            headers.append((b"content-length", b"%d" % len(early)))
        return Handover(answer=early, headers=headers)
    encoded = msgspec.json.encode(engine.decode_request(body, response))
    metrics.kv_legs.add(("result", "transferred"))
    return Handover(body=encoded)


class Receiving(Onward):
    """Passes a decode worker's answer on, unless it says that the KV blocks did not come."""

    def __init__(self, delivery: Delivery, engine: Engine, worker: Worker) -> None:
        super().__init__(delivery)
        self._engine = engine
        self._worker = worker

    async def deliver(self, response: UpstreamResponse, first: bytes) -> None:
        """Raises LegFailure."""
        status = response.status
        if self._engine.transfer_failed(status, first):
            raise LegFailure("status", self._worker, refusal(status, first), status=status)
        await super().deliver(response, first)
