"""Environment variables that engines have in common."""

from __future__ import annotations

from collections.abc import Collection

from ..config.model import RoleSpec
from ..errors import ConfigError
from .base import EngineContext


def common(context: EngineContext) -> dict[str, str]:
    """Caches on the node, Hugging Face, and the transport: the node's fabric, then the site's own."""
    plan, scratch = context.plan, context.scratch
    env = {
        "TRITON_CACHE_DIR": f"{scratch}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
        "FLASHINFER_WORKSPACE_BASE": scratch,
        "PYTHONUNBUFFERED": "1",
    }
    if not plan.site.node.internet:
        env["HF_HUB_OFFLINE"] = "1"
    interface = plan.site.network.control_interface
    if interface is not None and len(context.replica.nodes) > 1:
        env |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    return {**env, **context.fabric_env, **plan.site.network.env}


def given(context: EngineContext, own: Collection[str]) -> dict[str, str]:
    """`env` of model.yaml, the pool's over the common one. Raises ConfigError for a variable in `own`."""
    found: dict[str, str] = {}
    role = context.replica.role
    for where, env in (("env", context.plan.model.env), (f"{role}.env", pool(context).env)):
        for name, value in env.items():
            if name in own:
                raise ConfigError(
                    f"{where}.{name}: hpcserve sets this variable for each engine itself",
                    hint=f"remove it from `{where}` in model.yaml",
                )
            found[name] = value
    return found


def visible_gpus(context: EngineContext) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES; nothing where there are no GPUs."""
    if context.plan.device != "cuda":
        return {}
    names = context.gpu_names or tuple(map(str, range(context.plan.slots_per_node)))
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[gpu] for gpu in context.replica.gpus)}


def pool(context: EngineContext) -> RoleSpec:
    """What model.yaml says about the replica's pool."""
    return getattr(context.plan.model, context.replica.role) or RoleSpec()
