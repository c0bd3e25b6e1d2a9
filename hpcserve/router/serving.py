"""Several models behind one router: which workers serve which, and what `/v1/models` says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..config.model import ROLES, Role
from ..http.errors import HttpError

if TYPE_CHECKING:
    from .workers import Worker, WorkerTable

_NAMED_AT_MOST = 20
"""Models that an error lists."""
_CACHED = 256
"""Models whose workers are kept sorted out."""


class Serving(Protocol):
    """Workers that serve one model; a WorkerTable, where all serve the same."""

    @property
    def disaggregated(self) -> bool: ...
    @property
    def answering(self) -> list[Worker]: ...
    def with_role(self, role: Role) -> list[Worker]: ...


class _Part:
    """Some workers of a table."""

    def __init__(self, workers: Iterable[Worker]) -> None:
        workers = list(workers)
        self._by_role = {role: [worker for worker in workers if worker.role == role] for role in ROLES}

    def with_role(self, role: Role) -> list[Worker]:
        return self._by_role[role]

    @property
    def disaggregated(self) -> bool:
        return bool(self._by_role["decode"] or self._by_role["prefill"]) and not self._by_role["aggregated"]

    @property
    def answering(self) -> list[Worker]:
        return self._by_role["aggregated"] or self._by_role["decode"]


class Models:
    """All models of a table. A worker that has not named its own serves `default`."""

    def __init__(self, table: WorkerTable, default: str) -> None:
        self._table = table
        self._default = default
        self._version = -1
        self._names: dict[str, dict[str, Any]] = {}
        self._same = True
        self._parts: dict[str, Serving] = {}

    def serving(self, model: str | None, allowed: frozenset[str] | None = None) -> tuple[str, Serving]:
        """The model that a request means, and its workers. Raises HttpError 400 or 404.

        Without a name it is the only one there is; `allowed` limits what errors tell.
        """
        self._refresh()
        if not model:
            if len(self._bases()) > 1:
                raise HttpError(
                    400, f"the request names no model; served: {self._list(allowed)}", code="model_required"
                )
            model = self._default if self._default in self._names else next(iter(self._names), self._default)
        elif model not in self._names:
            raise HttpError(
                404,
                f"the model {model[:200]!r} is not served here; served: {self._list(allowed)}",
                code="model_not_found",
            )
        if self._same:
            return model, self._table
        part = self._parts.get(model)
        if part is None:
            if len(self._parts) >= _CACHED:
                self._parts.clear()
            part = self._parts[model] = _Part(w for w in self._table.all() if self._serves(w, model))
        return model, part

    def cards(self, allowed: frozenset[str] | None = None) -> list[dict[str, Any]]:
        """The entries of `/v1/models`, as engines wrote them where they said anything."""
        self._refresh()
        return [card for name, card in self._names.items() if allowed is None or name in allowed]

    @property
    def bases(self) -> tuple[str, ...]:
        """Served models that are no adapters."""
        self._refresh()
        return tuple(self._bases())

    def _bases(self) -> Sequence[str]:
        return [name for name, card in self._names.items() if card.get("parent") is None]

    def _serves(self, worker: Worker, model: str) -> bool:
        return any(card["id"] == model for card in worker.models) if worker.models else model == self._default

    def _list(self, allowed: frozenset[str] | None) -> str:
        names = [name for name in self._names if allowed is None or name in allowed]
        more = len(names) - _NAMED_AT_MOST
        return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")

    def _refresh(self) -> None:
        if self._version == self._table.version:
            return
        self._version = self._table.version
        self._parts = {}
        workers = self._table.all()
        named: dict[str, dict[str, Any]] = {}
        sets = set()
        for worker in workers:
            cards = worker.models or ({"id": self._default},)
            sets.add(frozenset(card["id"] for card in cards))
            for card in cards:
                named.setdefault(card["id"], {"object": "model", "owned_by": "hpcserve", **card})
        # With no worker at all the answer is that there is none, not that the model is unknown.
        self._names = named or {self._default: _card(self._default)}
        self._same = len(sets) <= 1


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "owned_by": "hpcserve"}
