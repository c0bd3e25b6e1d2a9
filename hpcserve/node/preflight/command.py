"""How a probe's process is started: beside this one, or in the engines' container."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from ..agent.engine_container import contained_argv, contained_environment, engines_apart
from ..inputs import Inputs
from .probes import Placed

_PROGRAM = ("-m", "hpcserve.node.preflight.probe")
_ADDED = {"UCX_PROTO_INFO": "y", "NIXL_LOG_LEVEL": "WARN"}
"""The tables that tell the transport, and no line per agent. What the site or model.yaml sets wins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    argv: tuple[str, ...]
    """The probe's own arguments come behind."""
    environ: Mapping[str, str]
    contained: bool = False
    """A container's runtime is between that process and this one."""


def probe_command(inputs: Inputs, placed: Placed) -> Command:
    """NIXL is what the engines have. Raises EngineError where the job script has told no runtime."""
    plan, environ = inputs.plan, {**_ADDED, **placed.environ}
    if not engines_apart(plan):
        return Command(argv=(sys.executable, *_PROGRAM), environ=environ)
    inside = (plan.site.container.python, *_PROGRAM)
    return Command(
        argv=contained_argv(plan, inputs.run.path, inside, scratch="/", environ=inputs.environ),
        environ=contained_environment(plan, environ, placed.added, outside=inputs.environ),
        contained=True,
    )
