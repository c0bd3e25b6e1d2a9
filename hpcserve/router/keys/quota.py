"""Holds a key to its limits, over all relays.

How exact: concurrent requests are never above the limit (two that come in the same moment to two relays may
both be refused at the last place). Tokens per minute are a bucket of one minute's tokens that fills again
evenly; relays see each other's at least every second. The total may be passed by what the answers running
in the last five seconds took beyond their estimates, and by up to 30 s of another run's use of the same key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from ...http.errors import HttpError
from ..board import Board, Cell
from .identity import NO_LIMITS, Identity, Limits
from .meter import Meter


class _Bucket:
    """Tokens per minute. Every process adds to one cell, and drains its own copy of the level."""

    __slots__ = ("_seen", "_spent", "_time", "level")

    def __init__(self, spent: Cell, now: float) -> None:
        self._spent = spent
        self._seen = spent.total
        self._time = now
        self.level = 0.0

    def look(self, per_minute: int, now: float) -> float:
        """Tokens in the bucket now."""
        total = self._spent.total
        drained = self.level - per_minute / 60.0 * (now - self._time)
        self.level = max(0.0, max(0.0, drained) + total - self._seen)
        self._seen, self._time = total, now
        return self.level

    def spend(self, tokens: float) -> None:
        self._spent.add(tokens)
        self._seen += tokens
        self.level += tokens


class KeyState:
    """What one key runs and has spent, as one relay sees it."""

    __slots__ = ("bucket", "limits", "reserved", "running")

    def __init__(self, board: Board, identity: Identity, now: float) -> None:
        self.limits = identity.limits
        self.running = board.cell(f"running {identity.key}") if self.limits.concurrent else None
        self.reserved = board.cell(f"reserved {identity.key}") if self.limits.tokens_total else None
        self.bucket: _Bucket | None = None
        if self.limits.tokens_per_minute:
            self.bucket = _Bucket(board.cell(f"spent {identity.key}"), now)

    def give_back(self, tokens: float, used: float) -> None:
        """A request that `take` let in with `tokens` has ended and used `used`."""
        if self.running is not None:
            self.running.add(-1.0)
        if self.reserved is not None:
            self.reserved.add(-tokens)
        if self.bucket is not None:
            self.bucket.spend(used - tokens)


class Quota:
    """The limits of all keys, as one relay holds to them."""

    def __init__(self, board: Board, meter: Meter) -> None:
        self._board = board
        self._meter = meter
        self._keys: dict[str, KeyState] = {}

    def look(self, identities: Iterable[Identity], now: float) -> None:
        """Once a second: see what other relays let in, from the start of a key on."""
        for identity in identities:
            if identity.limits is not NO_LIMITS and identity.limits != NO_LIMITS:
                self._key(identity, now)
        for key in self._keys.values():
            if key.bucket is not None and key.limits.tokens_per_minute:
                key.bucket.look(key.limits.tokens_per_minute, now)

    def _key(self, identity: Identity, now: float) -> KeyState:
        key = self._keys.get(identity.key)
        if key is None or key.limits != identity.limits:
            key = self._keys[identity.key] = KeyState(self._board, identity, now)
        return key

    def take(self, identity: Identity, tokens: float, now: float) -> KeyState:
        """A request of about so many tokens begins; what comes back ends it with `give_back()`.

        Raises HttpError 403 and 429, and nothing is taken then.
        """
        key = self._key(identity, now)
        limits = key.limits
        if key.reserved is not None and limits.tokens_total is not None:
            used = self._meter.total(identity.key)
            if used + key.reserved.total >= limits.tokens_total:
                raise _spent(identity, used, limits.tokens_total)
        if key.bucket is not None and limits.tokens_per_minute is not None:
            level = key.bucket.look(limits.tokens_per_minute, now)
            # A request above the whole limit would never fit: it waits for an empty bucket.
            over = level + min(tokens, limits.tokens_per_minute) - limits.tokens_per_minute
            if over > 0.0:
                raise _too_many(limits, over)
        if key.running is not None and limits.concurrent is not None:
            # Counted first, then looked at: two processes can't both take the last place.
            key.running.add(1.0)
            if key.running.total > limits.concurrent:
                key.running.add(-1.0)
                raise _too_wide(limits)
        if key.reserved is not None:
            key.reserved.add(tokens)
        if key.bucket is not None:
            key.bucket.spend(tokens)
        return key


def _refusal(status: int, message: str, reason: str, seconds: float | None = None) -> HttpError:
    headers = [(b"x-hpcserve-reason", reason.encode())]
    if seconds is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(seconds))))
    return HttpError(status, message, headers=tuple(headers), code=reason)


def _spent(identity: Identity, used: int, total: int) -> HttpError:
    return _refusal(
        403,
        f"the key {identity.key} has used {used} of its {total} tokens, and what runs may take the rest; "
        "ask its owner for a new one",
        "token_quota_used_up",
    )


def _too_many(limits: Limits, over: float) -> HttpError:
    per_minute = limits.tokens_per_minute or 1
    seconds = over * 60.0 / per_minute
    return _refusal(
        429,
        f"this key's limit is {per_minute} tokens a minute; there is room again in {math.ceil(seconds)} s",
        "tokens_per_minute",
        seconds,
    )


def _too_wide(limits: Limits) -> HttpError:
    return _refusal(
        429,
        f"this key's limit is {limits.concurrent} requests at one time",
        "concurrent_requests",
        1.0,
    )
