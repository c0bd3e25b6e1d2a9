"""Probes, pairs and outcomes for tests of what is done with them."""

from __future__ import annotations

from hpcserve.node.preflight.records import Broken, Figure, Operation, Outcome, Pair, Probe


def probe(rank: int, role: str = "both", *, number: int = 0, device: str = "mlx5_0:1") -> Probe:
    return Probe(
        name=f"{rank}.{number}",
        rank=rank,
        node=f"n{rank}",
        replicas=(f"{role}-{rank}",),
        prefill=role in ("prefill", "both"),
        decode=role in ("decode", "both"),
        devices=(device,),
        env={"UCX_NET_DEVICES": device},
        group=number,
    )


def pair(
    prefill: Probe, decode: Probe, gbs: float | None, *, link: float | None = None, back: float | None = None
) -> Pair:
    """`gbs` is every operation's rate, or `back` the one of bytes to the prefill node; None fails."""
    if gbs is None:
        return Pair(prefill=prefill, decode=decode, broken=Broken(cause="timeout", message="nothing came"))
    order: tuple[tuple[Operation, Probe, Probe], ...] = (
        ("read", decode, prefill),
        ("write", prefill, decode),
        ("read", prefill, decode),
        ("write", decode, prefill),
    )
    figures = []
    for operation, initiator, target in order:
        source = target if operation == "read" else initiator
        figures.append(
            Figure(
                operation=operation,
                source=source.node,
                initiator=initiator.node,
                gbs=back if back is not None and source == decode else gbs,
                size=1 << 20,
                transport=f"rc_mlx5/{initiator.devices[0]} (zero-copy)",
                devices=initiator.devices,
                link_gbs=link,
            )
        )
    return Pair(prefill=prefill, decode=decode, figures=tuple(figures), latency_us=3.0)


def outcome(*pairs: Pair, **broken: Broken) -> Outcome:
    return Outcome(pairs=pairs, broken=broken, seconds=1.0)
