"""Where an engine's KV events are read.

In a run that is a pair of Unix sockets in the replica's private directory: events carry prompts' tokens,
and whoever shares the node must not read them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# vLLM (0.32) and SGLang (0.5.23) make other ranks' addresses out of rank 0's: they append the rank where
# `inproc` is anywhere in the address, and refuse other Unix sockets.
_EVENTS = "kv.inproc"
_REPLAY = "kv-replay.inproc"
_LONGEST_PATH = 107
"""Bytes of a Unix socket's path, less the final zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventEndpoint:
    """ZMQ addresses to connect to: `ipc:///path` or `tcp://host:port`."""

    events: str
    replay: str | None = None
    """Without it, a gap in the events is one in what is known."""
    rank: int = 0
    """The data-parallel rank that publishes there."""


def in_directory(scratch: str, ranks: Iterable[int] = (0,)) -> tuple[EventEndpoint, ...]:
    """Those of data-parallel ranks that run in a replica's private directory.

    () where a socket's path would be longer than the system allows: such a replica publishes nothing.
    """
    if too_deep(scratch):
        return ()
    found = []
    for rank in ranks:
        events, replay = (f"{scratch}/{name}{f'_dp{rank}' if rank else ''}" for name in (_EVENTS, _REPLAY))
        found.append(EventEndpoint(events=f"ipc://{events}", replay=f"ipc://{replay}", rank=rank))
    return tuple(found)


def too_deep(scratch: str) -> bool:
    """Would the path of a rank's socket there be longer than the system allows?"""
    return len(f"{scratch}/{_REPLAY}_dp999".encode()) > _LONGEST_PATH


def config(scratch: str) -> dict[str, Any]:
    """The value of vLLM's `--kv-events-config` that makes an engine publish there."""
    return {"enable_kv_cache_events": True, **publisher(scratch)}


def publisher(scratch: str) -> dict[str, Any]:
    """That of SGLang's, which publishes whenever there is a publisher."""
    return {
        "publisher": "zmq",
        "endpoint": f"ipc://{scratch}/{_EVENTS}",
        "replay_endpoint": f"ipc://{scratch}/{_REPLAY}",
    }


def ranks_on(node: int, *, nodes: int, ranks: int) -> range:
    """Data-parallel ranks whose scheduler is on a node of a replica. Nodes and ranks divide evenly."""
    if ranks >= nodes:
        each = ranks // nodes
        return range(node * each, (node + 1) * each)
    span = nodes // ranks
    return range(0) if node % span else range(node // span, node // span + 1)
