"""The last decisions of one router process."""

from __future__ import annotations

from collections import deque
from time import time
from typing import TYPE_CHECKING, Any

import msgspec

from .explain import explain

if TYPE_CHECKING:
    from ..call import Call
    from ..placement.decision import Decision

KEPT = 2048
"""Requests; with three candidates each, 2.3 MB of workers and 3.1 MB of pairs."""
MOST = 200
"""Requests in one answer."""
Json = dict[str, Any]


class _Entry(msgspec.Struct, frozen=True):
    at: float
    request_id: str
    user: str
    path: str
    model: str
    status: int
    retries: int
    migrations: int
    decisions: tuple[Decision, ...]


class Ring:
    """Keeps decisions as they were made; they become JSON when somebody asks."""

    def __init__(self, kept: int = KEPT) -> None:
        self._entries: deque[_Entry] = deque(maxlen=kept)

    def add(self, call: Call) -> None:
        """A request that has ended."""
        self.put(
            call.request_id, call.user, call.route.path, call.model, call.exchange.status, call.retries,
            call.migrations, tuple(call.decisions),
        )  # fmt: skip

    def put(
        self,
        request_id: str,
        user: str,
        path: str,
        model: str,
        status: int,
        retries: int,
        migrations: int,
        decisions: tuple[Decision, ...],
    ) -> None:
        """The same, without a Call."""
        self._entries.append(
            _Entry(time(), request_id, user, path, model, status, retries, migrations, decisions)
        )

    def find(self, *, request_id: str | None = None, user: str | None = None, limit: int = 20) -> list[Json]:
        """The newest requests first. `user`: only those of the key with this name."""
        found: list[Json] = []
        for entry in reversed(self._entries):
            if user is not None and entry.user != user:
                continue
            if request_id is not None and entry.request_id != request_id:
                continue
            found.append(_json(entry))
            if len(found) >= limit:
                break
        return found


def _json(entry: _Entry) -> Json:
    return {
        "time": round(entry.at, 3),
        "request_id": entry.request_id,
        "user": entry.user,
        "path": entry.path,
        "model": entry.model,
        "status": entry.status,
        "retries": entry.retries,
        "migrations": entry.migrations,
        "decisions": [explain(decision) for decision in entry.decisions],
    }
