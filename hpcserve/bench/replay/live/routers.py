"""The routers a trace is played against, and how each is started in front of the engines."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...router.peers import MODEL, Command, free_port
from ..simulate import Setup
from . import dynamo
from .fleet import FakeEngine
from .scale import Scale

_NEVER_REFUSED = 3600.0
"""The peers refuse nobody however long the engines' queues are: so that all play the same requests, ours
doesn't either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """What a router is started with."""

    executable: str
    directory: Path
    """For its files; removed afterwards."""
    port: int
    engines: Sequence[FakeEngine]
    """Empty where the router brings its own."""
    setup: Setup
    scale: Scale


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRouter:
    name: str
    program: str
    """As in the other benchmark's peers."""
    command: Callable[[Front], Command]
    simulated: str | None
    """The policy of the simulation that says what to expect."""
    own_engines: bool = False
    """Not our fake ones: what was in their caches is read off the answers, not off metrics."""


def _hpcserve(policy: str, *, events: bool = True) -> Callable[[Front], Command]:
    def command(front: Front) -> Command:
        names = {engine: f"aggregated-{number}" for number, engine in enumerate(front.engines)}
        config: dict[str, Any] = {
            "served_name": MODEL,
            "engine": "fake",
            "host": "127.0.0.1",
            "port": front.port,
            "policy": policy,
            "queue_seconds": _NEVER_REFUSED,
            "workers": [
                {"name": name, "role": "aggregated", "url": engine.url} for engine, name in names.items()
            ],
        }
        if events:
            config["kv_events"] = {
                name: [(f"tcp://127.0.0.1:{engine.events}", f"tcp://127.0.0.1:{engine.replay}")]
                for engine, name in names.items()
            }
        path = front.directory / "router.json"
        path.write_text(json.dumps(config))
        return Command(argv=(front.executable, "-m", "hpcserve.router", "--config", str(path)))

    return command


def _vllm_router(policy: str) -> Callable[[Front], Command]:
    def command(front: Front) -> Command:
        argv = [
            front.executable, "--host", "127.0.0.1", "--port", str(front.port), "--policy", policy,
            "--worker-urls", *(engine.url for engine in front.engines),
            "--prometheus-port", str(free_port()), "--log-level", "error",
        ]  # fmt: skip
        if policy == "kv_aware":
            argv += ["--kv-event-block-size", str(front.scale.block_tokens), "--kv-event-model", MODEL]
            for engine in front.engines:
                argv += ["--kv-event-source", f"{engine.url}=tcp://127.0.0.1:{engine.events}"]
                argv += ["--kv-event-replay-source", f"{engine.url}=tcp://127.0.0.1:{engine.replay}"]
        return Command(argv=tuple(argv))

    return command


def _dynamo(mode: str) -> Callable[[Front], Command]:
    def command(front: Front) -> Command:
        model, speeds = front.directory / "model", front.directory / "speeds.npz"
        engine, scale = front.setup.engine, front.scale
        dynamo.write_model(model)
        dynamo.write_speeds(speeds, engine, scale)
        store = ("--discovery-backend", "file")
        mocker = (
            front.executable, "-m", "dynamo.mocker", "--model-path", str(model), "--model-name", MODEL,
            "--num-workers", str(front.setup.workers), "--block-size", str(scale.block_tokens),
            "--num-gpu-blocks-override", str(engine.blocks),
            "--max-model-len", str(engine.blocks * scale.block_tokens),
            "--max-num-batched-tokens", str(scale.step_tokens(engine)),
            "--planner-profile-data", str(speeds), *store,
        )  # fmt: skip
        frontend = (
            front.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1",
            "--http-port", str(front.port), "--router-mode", mode, *store,
        )  # fmt: skip
        env = {
            "DYN_FILE_KV": str(front.directory / "kv"), "DYN_REQUEST_PLANE": "tcp", "DYN_EVENT_PLANE": "zmq",
            "DYN_LOG": "error",
        }  # fmt: skip
        return Command(argv=frontend, beside=(mocker,), env=env)

    return command


ROUTERS = (
    LiveRouter(name="hpcserve kv", program="hpcserve", command=_hpcserve("kv"), simulated="kv"),
    LiveRouter(
        name="hpcserve kv, no events",
        program="hpcserve",
        command=_hpcserve("kv", events=False),
        simulated="kv, no events",
    ),
    LiveRouter(
        name="vllm-router round_robin",
        program="vllm-router",
        command=_vllm_router("round_robin"),
        simulated="round_robin",
    ),
    LiveRouter(
        name="vllm-router cache_aware",
        program="vllm-router",
        command=_vllm_router("cache_aware"),
        simulated="cache_aware (formula)",
    ),
    LiveRouter(
        name="vllm-router kv_aware",
        program="vllm-router",
        command=_vllm_router("kv_aware"),
        simulated=None,
    ),
    LiveRouter(
        name="Dynamo kv",
        program="python:dynamo.frontend",
        command=_dynamo("kv"),
        simulated="dynamo (formula)",
        own_engines=True,
    ),
)
