"""What is measured, by whom, and what came out. All of it goes over the wire and into preflight.json.

Loaded in images without hpcserve too: with the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

Operation = Literal["read", "write"]
Cause = Literal["timeout", "transfer", "data", "died", "import", "backend", "memory", "silent"]
LINK: tuple[Cause, ...] = ("timeout", "transfer", "data")
"""Causes that are about the way between two nodes, and not about a process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One process with a NIXL agent: a node, the transport variables of one of its replicas, and a rail."""

    name: str
    """Unique in the run, such as `1.0`: rank and number."""
    rank: int
    node: str
    replicas: tuple[str, ...]
    """Those that get these variables."""
    prefill: bool
    decode: bool
    devices: tuple[str, ...]
    """UCX_NET_DEVICES; () lets UCX choose."""
    env: Mapping[str, str]
    """The transport variables (UCX_*, NIXL_*) that hpcserve, the site and model.yaml set."""
    group: int = 0
    """The probes of a node with the same variables have the same: they differ in the rail."""
    gpu: int | None = None
    """Of the node's GPUs the one with its buffer, where the group has several."""
    rail: tuple[str, ...] = ()
    """Those of `devices` that are nearest to its GPU; () where nobody knows."""
    nvlink: bool = False
    """KV goes over NVLink to all its partners, and is measured over the network all the same."""

    @property
    def label(self) -> str:
        return self.node if self.gpu is None else f"{self.node} GPU {self.gpu}"

    @property
    def expected(self) -> tuple[str, ...]:
        """The devices UCX should use."""
        return self.rail or self.devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Where a probe's test buffers are, and how NIXL reaches them."""

    metadata: str
    """NIXL's agent metadata, base64."""
    source: int
    """Address of the bytes that others read."""
    sink: int
    """Address of the bytes that others write."""
    size: int
    """Bytes of each."""
    kind: Literal["DRAM", "VRAM"]
    device: int
    seconds: float
    """From the start of the process until NIXL could begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One operation of one pair."""

    operation: Operation
    source: str
    """Node the bytes came from."""
    initiator: str
    """Node that asked NIXL for them."""
    gbs: float
    """10^9 bytes per second."""
    size: int
    """Bytes of one transfer."""
    transport: str | None
    """What UCX said it uses; None when it said nothing."""
    devices: tuple[str, ...]
    """Of the initiator: what UCX used, else what it was allowed to use."""
    link_gbs: float | None
    """Rate of those devices together; None when nobody knows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """Why something could not be measured."""

    cause: Cause
    message: str
    hint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A prefill and a decode probe, measured."""

    prefill: Probe
    decode: Probe
    figures: tuple[Figure, ...] = ()
    latency_us: float | None = None
    """Of a small read by the decode side, the median."""
    broken: Broken | None = None

    @property
    def name(self) -> str:
        return f"{self.prefill.label} → {self.decode.label}"

    @property
    def nvlink(self) -> bool:
        """Its KV goes over NVLink: the figures tell nothing of how it will go."""
        return self.prefill.nvlink and self.decode.nvlink

    def better(self, again: Pair) -> Pair:
        """Of two measurements, each operation's faster one: what is in the way only ever slows it down."""
        if again.broken is not None:
            return self
        figures = tuple(
            max(one, other, key=lambda figure: figure.gbs)
            for one, other in zip(self.figures, again.figures, strict=True)
        )
        latency = min(self.latency_us or 0.0, again.latency_us or 0.0)
        return Pair(prefill=self.prefill, decode=self.decode, figures=figures, latency_us=latency)

    @property
    def slowest(self) -> Figure | None:
        return min(self.figures, key=lambda figure: figure.gbs, default=None)

    @property
    def gbs(self) -> float | None:
        """The slowest operation's rate; None for a pair that failed."""
        slowest = self.slowest
        return None if slowest is None or self.broken is not None else slowest.gbs

    @property
    def link_gbs(self) -> float | None:
        """The slower one of both ends' links; None when neither is known."""
        known = [figure.link_gbs for figure in self.figures if figure.link_gbs is not None]
        return min(known, default=None)

    @property
    def ratio(self) -> float | None:
        """The slowest operation as a part of the link's rate."""
        if self.gbs is None or self.link_gbs is None:
            return None
        return self.gbs / self.link_gbs


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A whole preflight."""

    pairs: tuple[Pair, ...]
    broken: Mapping[str, Broken] = field(default_factory=dict)
    """Nodes (or probes of nodes) that could take no part, by the node's name."""
    unmeasured: int = 0
    """Pairs there was no time for, or whose node was out."""
    seconds: float = 0.0
    """From the start of the program on rank 0."""
    starting: float = 0.0
    """Of these, until NIXL was ready on all nodes."""
    cut_short: bool = False
    """It was told to end."""
    nvlink: bool = False
    """There are nodes between which KV goes over NVLink, which was not measured."""


def to_json(value: Any) -> Any:
    """A record as plain JSON values."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: to_json(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {name: to_json(each) for name, each in value.items()}
    return [to_json(each) for each in value] if isinstance(value, (list, tuple)) else value
