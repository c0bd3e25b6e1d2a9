"""The fake engine: another engine's protocols and metrics without a model (`hpcserve.engines.fake_server`).

Whose, says `dialect` in the top-level `engine_args`. There is a class for each: the program is one, and they
differ in the protocol and in what belongs to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from ..config.model import RoleSpec
from ..errors import ConfigError
from ..plan.plan import ReplicaPlan
from . import arguments
from .base import Engine, EngineCommand, EngineContext
from .context_protocol import ContextEngine
from .kv_events import endpoints
from .nixl_protocol import NixlEngine
from .pair_protocol import BOOTSTRAP_PORT, PairEngine

_OURS = "hpcserve sets it from the plan"
RESERVED: Mapping[str, str] = {
    "model": "use the top-level key `model`",
    "served-model-name": "use the top-level key `served_name`",
    "max-model-len": "use the top-level key `max_model_len`",
    "host": _OURS,
    "port": _OURS,
    "role": _OURS,
    "side-channel-port": _OURS,
    "bootstrap-port": _OURS,
    "data-parallel-size": "use `data_parallel` of the pool",
    "kv-lease": "use the top-level key `kv_lease`",
    "shutdown-timeout": "it follows from `slurm.kill_wait` of the site; see also the top-level key `drain`",
}
_DETAILS = "enable-prompt-tokens-details"
_DIALECT = "dialect"
_SIDE_CHANNEL = "side_channel"
_LOADING = re.compile(r"Loading safetensors checkpoint shards:\s+\d+% Completed \| (\d+)/(\d+)")


class _Program(Engine):
    """The program, whatever it speaks."""

    key_variable = "FAKE_ENGINE_API_KEY"
    dialect: ClassVar[str]

    def configured(self, engine_args: Mapping[str, Any]) -> Engine:
        dialects: Mapping[str, type[_Program]] = {
            each.dialect: each for each in (Fake, FakeSGLang, FakeTensorRTLLM)
        }
        _, wanted = arguments.merge("", engine_args, {}).get(_DIALECT, ("", Fake.dialect))
        if not isinstance(wanted, str) or wanted not in dialects:
            raise ConfigError(
                f"engine_args.{_DIALECT} must be one of {', '.join(dialects)}, not {wanted!r}",
                hint="leave it out for an engine that speaks like vLLM",
            )
        return dialects[wanted]()

    def meeting_ports(self, role: str) -> Mapping[str, str]:
        """Ports besides `http` in this role: name -> flag."""
        return {} if role == "aggregated" else {_SIDE_CHANNEL: "--side-channel-port"}

    def ports(self, replica: ReplicaPlan) -> Mapping[str, int]:
        return {"http": 1, **dict.fromkeys(self.meeting_ports(replica.role), replica.data_parallel)}

    def command(self, context: EngineContext) -> EngineCommand:
        """Raises ConfigError when `engine_args` sets what hpcserve sets, and for a pool's own dialect."""
        plan, ports, role = context.plan, context.ports, context.replica.role
        pool = getattr(plan.model, role) or RoleSpec()
        args = arguments.merge(role, plan.model.engine_args, pool.engine_args)
        arguments.refuse(args, RESERVED, "the fake engine")
        where, _ = args.pop(_DIALECT, ("", None))
        if where.startswith(role):
            raise ConfigError(
                f"{where}: all replicas of a run speak one dialect",
                hint="set it in the top-level `engine_args`",
            )
        argv = [context.python, "-m", "hpcserve.engines.fake_server", "--model", context.model_path]
        argv += ["--served-model-name", plan.served_name, "--role", role]
        if self.dialect != Fake.dialect:
            argv += ["--dialect", self.dialect]
        argv += ["--host", context.address, "--port", ports["http"]]
        for name, flag in self.meeting_ports(role).items():
            argv += [flag, ports[name]]
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

    def publishes(self, role: str) -> bool:
        """Does a replica in this role say which prefixes it has?"""
        return True

    def kv_event_endpoints(self, context: EngineContext) -> tuple[endpoints.EventEndpoint, ...]:
        """() as well where `engine_args` say themselves what becomes of the events."""
        model, role = context.plan.model, context.replica.role
        pool = getattr(model, role) or RoleSpec()
        given = arguments.merge(role, model.engine_args, pool.engine_args)
        if "kv-events-config" in given or not self.publishes(role):
            return ()
        return endpoints.in_directory(context.scratch, range(context.replica.data_parallel))

    def progress(self, line: str) -> str | None:
        match = _LOADING.search(line)
        return f"weights {match[1]}/{match[2]}" if match else None


class Fake(_Program, NixlEngine):
    name = "fake"
    dialect = "vllm"


class FakeSGLang(_Program, PairEngine):
    name = "fake-sglang"
    dialect = "sglang"
    health_path = "/ready"

    def meeting_ports(self, role: str) -> Mapping[str, str]:
        return {BOOTSTRAP_PORT: "--bootstrap-port"} if role == "prefill" else {}

    def publishes(self, role: str) -> bool:
        """As SGLang's, which on decode replicas keep no prefixes by default."""
        return role != "decode"


class FakeTensorRTLLM(_Program, ContextEngine):
    name = "fake-tensorrt-llm"
    dialect = "tensorrt-llm"

    def publishes(self, role: str) -> bool:
        """As TensorRT-LLM's under hpcserve (`docs/engines.md`)."""
        return False
