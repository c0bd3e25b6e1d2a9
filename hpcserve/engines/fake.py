"""The fake engine: vLLM's protocols and metrics without a model (`hpcserve.engines.fake_server`)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..config.model import RoleSpec
from ..plan.plan import ReplicaPlan
from . import arguments
from .base import EngineCommand, EngineContext
from .kv_events import endpoints
from .nixl_protocol import NixlEngine

_OURS = "hpcserve sets it from the plan"
_DIALECT = "a run of the fake engine speaks vLLM's protocols; others' are for tests of the router"
RESERVED: Mapping[str, str] = {
    "model": "use the top-level key `model`",
    "served-model-name": "use the top-level key `served_name`",
    "max-model-len": "use the top-level key `max_model_len`",
    "host": _OURS,
    "port": _OURS,
    "role": _OURS,
    "side-channel-port": _OURS,
    "data-parallel-size": "use `data_parallel` of the pool",
    "dialect": _DIALECT,
    "bootstrap-port": _DIALECT,
    "bootstrap-timeout": _DIALECT,
    "kv-lease": "use the top-level key `kv_lease`",
    "shutdown-timeout": "it follows from `slurm.kill_wait` of the site; see also the top-level key `drain`",
}
_DETAILS = "enable-prompt-tokens-details"
_LOADING = re.compile(r"Loading safetensors checkpoint shards:\s+\d+% Completed \| (\d+)/(\d+)")


class Fake(NixlEngine):
    name = "fake"
    key_variable = "FAKE_ENGINE_API_KEY"

    def ports(self, replica: ReplicaPlan) -> Mapping[str, int]:
        ports = {"http": 1}
        if replica.role != "aggregated":
            ports["side_channel"] = replica.data_parallel
        return ports

    def command(self, context: EngineContext) -> EngineCommand:
        plan, ports, role = context.plan, context.ports, context.replica.role
        pool = getattr(plan.model, role) or RoleSpec()
        args = arguments.merge(role, plan.model.engine_args, pool.engine_args)
        arguments.refuse(args, RESERVED, "the fake engine")
        argv = [context.python, "-m", "hpcserve.engines.fake_server", "--model", context.model_path]
        argv += ["--served-model-name", plan.served_name, "--role", role]
        argv += ["--host", context.address, "--port", ports["http"]]
        if role != "aggregated":
            argv += ["--side-channel-port", ports["side_channel"]]
        if context.replica.data_parallel > 1:
            argv += ["--data-parallel-size", str(context.replica.data_parallel)]
        argv += ["--kv-lease", str(plan.model.kv_lease)]
        if plan.model.max_model_len is not None:
            argv += ["--max-model-len", str(plan.model.max_model_len)]
        if self.kv_event_endpoints(context):
            argv += ["--kv-events-config", arguments.compact(endpoints.config(context.scratch))]
        # The router learns from each answer's usage how well its prediction of prefix hits was.
        if _DETAILS not in args:
            argv.append(f"--{_DETAILS}")
        argv += ["--shutdown-timeout", str(max(1, plan.site.slurm.kill_wait // 2))]
        argv += arguments.flags(args, repeat_lists=True)
        env = {"PYTHONUNBUFFERED": "1", **plan.model.env, **pool.env}
        return EngineCommand(argv=tuple(argv), env=env)

    def kv_event_endpoints(self, context: EngineContext) -> tuple[endpoints.EventEndpoint, ...]:
        """() as well where `engine_args` say themselves what becomes of the events."""
        model = context.plan.model
        pool = getattr(model, context.replica.role) or RoleSpec()
        if "kv-events-config" in arguments.merge(context.replica.role, model.engine_args, pool.engine_args):
            return ()
        return endpoints.in_directory(context.scratch, range(context.replica.data_parallel))

    def progress(self, line: str) -> str | None:
        match = _LOADING.search(line)
        return f"weights {match[1]}/{match[2]}" if match else None
