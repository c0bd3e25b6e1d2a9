"""The event batches that vLLM (0.32) and SGLang (0.5.23) publish, in msgpack.

A batch is `[timestamp, events, data-parallel rank]`; the rank, and whatever a later version adds, may be
missing or more. An event is a map with its name under `type`, or, as older engines have it, an array
that begins with its name. Fields this module doesn't know are passed over, and so are events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

Hash = int | bytes
"""An engine's own name for a block. vLLM sends bytes with VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0."""

GPU, CPU, STORAGE = 0, 1, 2
TIERS = ("GPU", "CPU", "STORAGE")
_TIER = {"GPU": GPU, "CPU": CPU, "CPU_PINNED": CPU, "STORAGE": STORAGE, "DISK": STORAGE, "EXTERNAL": STORAGE}

_STORED = (
    "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name",
    "extra_keys", "group_idx",
)  # fmt: skip
_REMOVED = ("block_hashes", "medium", "group_idx")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStored:
    """Blocks in a row, each the parent of the next."""

    hashes: Sequence[Hash]
    parent: Hash | None
    tokens: Sequence[int]
    """Of all blocks; may be empty where a block only moves to another tier."""
    block_size: int
    tier: int
    lora: str | None = None
    salt: str | None = None
    extra: Sequence[Sequence[Any] | None] = ()
    """For each block, what its hash covers besides tokens; () if there is nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRemoved:
    hashes: Sequence[Hash]
    tier: int | None
    """None: from every tier."""


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    pass


Event = BlockStored | BlockRemoved | AllBlocksCleared

_unpack = msgspec.msgpack.Decoder().decode


def decode(payload: bytes) -> list[Event]:
    """Raises ValueError for what is no batch of events."""
    try:
        batch = _unpack(payload)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"not msgpack: {error}") from error
    if not isinstance(batch, list) or len(batch) < 2 or not isinstance(batch[1], list):
        raise ValueError("not a batch of KV events: it should be [timestamp, events, …]")
    events = []
    for raw in batch[1]:
        event = _event(raw)
        if event is not None:
            events.append(event)
    return events


def _event(raw: Any) -> Event | None:
    kind, fields = _fields(raw)
    if kind == "AllBlocksCleared":
        return AllBlocksCleared()
    if kind not in ("BlockStored", "BlockRemoved") or fields.get("group_idx"):
        # Hybrid models announce a prefix once per group of layers: the first group tells enough.
        return None
    try:
        return _stored(fields) if kind == "BlockStored" else _removed(fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a {kind} without its fields: {error}") from error


def _fields(raw: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(raw, dict):
        return str(raw.get("type")), raw
    if isinstance(raw, list) and raw and isinstance(raw[0], str):
        names = _STORED if raw[0] == "BlockStored" else _REMOVED
        return raw[0], dict(zip(names, raw[1:], strict=False))
    raise ValueError("an event should be a map, or an array that starts with its name")


def _stored(fields: dict[str, Any]) -> BlockStored:
    hashes, tokens = _list(fields["block_hashes"]), _list(fields.get("token_ids") or [])
    size = int(fields["block_size"])
    if tokens and len(tokens) != size * len(hashes):
        raise ValueError(f"{len(tokens)} tokens in {len(hashes)} blocks of {size}")
    return BlockStored(
        hashes=hashes,
        parent=fields.get("parent_block_hash"),
        tokens=tokens,
        block_size=size,
        tier=_tier(fields.get("medium")) or GPU,
        lora=fields.get("lora_name") or _lora(fields.get("lora_id")),
        salt=fields.get("cache_salt"),
        extra=_list(fields["extra_keys"]) if fields.get("extra_keys") else (),
    )


def _removed(fields: dict[str, Any]) -> BlockRemoved:
    return BlockRemoved(hashes=_list(fields["block_hashes"]), tier=_tier(fields.get("medium")))


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.40} instead of a list")
    return value


def _lora(number: int | None) -> str | None:
    """Engines before `lora_name`: their numbers at least keep adapters apart."""
    return None if number is None else f"#{number}"


def _tier(medium: str | None) -> int | None:
    return None if medium is None else _TIER.get(medium.upper(), STORAGE)
