"""Contexts of engine processes, as an agent would make them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hpcserve import engines
from hpcserve.config.model import ModelSpec
from hpcserve.config.site import Site
from hpcserve.engines.base import EngineCommand, EngineContext
from tests.plan.cases import plan

FIRST_PORT = 20001


def context(
    spec: ModelSpec, at: Site, *, replica: str, node: int = 0, nodes: int | None = None, **more: Any
) -> EngineContext:
    planned = plan(spec, at, nodes=nodes)
    (chosen,) = [each for each in planned.replicas if each.name == replica]
    ports, port = {}, FIRST_PORT
    for name, count in sorted(engines.of(spec).ports(chosen).items()):
        ports[name] = str(port)
        port += count
    made = EngineContext(
        plan=planned,
        replica=chosen,
        node=node,
        address=f"10.0.0.{chosen.nodes[node] + 1}",
        head_address=f"10.0.0.{chosen.nodes[0] + 1}",
        ports=ports,
        model_path=planned.model.model,
        python="/opt/bin/python",
        scratch="/tmp/job",
    )
    return replace(made, **more)


def command(spec: ModelSpec, at: Site, **where: Any) -> EngineCommand:
    return engines.of(spec).command(context(spec, at, **where))


def flags(argv: tuple[str, ...]) -> dict[str, str | None]:
    """`--flag VALUE` pairs; None for a bare flag."""
    found: dict[str, str | None] = {}
    for index, word in enumerate(argv):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            following = argv[index + 1] if index + 1 < len(argv) else "--"
            found[name] = value if equals else (None if following.startswith("--") else following)
    return found
