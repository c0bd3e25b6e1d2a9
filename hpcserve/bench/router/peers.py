"""The routers compared: where each is found, and how it is started in front of the mock engines."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import RunError

KEY = "sk-bench"
MODEL = "mock"
_BELOW = ("", "bin", "usr/sbin", "venv/bin", "sbin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a router is started with."""

    executable: str
    directory: Path
    """For its files; removed afterwards."""
    port: int
    engines: tuple[int, ...]
    """Ports of the mock engines. With two legs the first is prefill."""
    peers: Path | None = None
    """The directory where peers are installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    argv: tuple[str, ...]
    beside: tuple[tuple[str, ...], ...] = ()
    """Processes it needs whose cost is not its own: engines that only it can talk to."""
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A router in one way of use."""

    name: str
    program: str
    """Its executable, or `python:MODULE` for a module of a virtual environment."""
    command: Callable[[Place], Command]
    two_legs: bool = False


def find(program: str, directory: Path | None) -> str | None:
    """The path of an executable below `directory` or on PATH; None if it is not installed."""
    if program == "hpcserve":
        return sys.executable
    module = program.partition(":")[2]
    name = "python" if module else program
    places = [directory / below for below in _BELOW] if directory is not None else []
    if module:
        for place in places:
            for package in (place.parent / "lib").glob(f"python3*/site-packages/{module.replace('.', '/')}"):
                if package.is_dir() and (place / name).exists():
                    return str(place / name)
        return None
    for place in places:
        if os.access(place / name, os.X_OK) and (place / name).is_file():
            return str(place / name)
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _urls(place: Place) -> list[str]:
    return [f"http://127.0.0.1:{port}" for port in place.engines]


def _ours(place: Place, *workers: str, policy: str = "kv") -> Command:
    key = place.directory / "key"
    key.write_text(f"{KEY}\n")
    argv = (
        place.executable, "-m", "hpcserve", "router", *workers, "--port", str(place.port),
        "--key-file", str(key), "--policy", policy,
    )  # fmt: skip
    return Command(argv=argv)


def _hpcserve(place: Place) -> Command:
    return _ours(place, "--aggregated", *_urls(place))


def _hpcserve_two_legs(*options: str, policy: str = "kv") -> Callable[[Place], Command]:
    def command(place: Place) -> Command:
        prefill, *decode = _urls(place)
        return _ours(place, *options, "--prefill", prefill, "--decode", *decode, policy=policy)

    return command


def _nginx(place: Place) -> Command:
    servers = "".join(f"server 127.0.0.1:{port};" for port in place.engines)
    config = place.directory / "nginx.conf"
    config.write_text(
        f"""
daemon off; worker_processes 1; pid {place.directory}/pid; error_log stderr error;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_max_body_size 64m; client_body_buffer_size 1m; tcp_nodelay on;
  client_body_temp_path {place.directory}/body; proxy_temp_path {place.directory}/proxy;
  fastcgi_temp_path {place.directory}/f; uwsgi_temp_path {place.directory}/u;
  scgi_temp_path {place.directory}/s;
  upstream engines {{ {servers} keepalive 256; }}
  server {{
    listen 127.0.0.1:{place.port} backlog=2048; keepalive_requests 100000000;
    location / {{
      proxy_pass http://engines; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 600s;
    }}
  }}
}}
"""
    )
    return Command(argv=(place.executable, "-c", str(config), "-p", str(place.directory), "-e", "stderr"))


def _haproxy(place: Place) -> Command:
    servers = "\n".join(f"  server e{port} 127.0.0.1:{port}" for port in place.engines)
    config = place.directory / "haproxy.cfg"
    config.write_text(
        f"""
global
  nbthread 1
  maxconn 4096
defaults
  mode http
  timeout connect 5s
  timeout client 600s
  timeout server 600s
frontend in
  bind 127.0.0.1:{place.port}
  default_backend engines
backend engines
  balance roundrobin
  http-reuse always
{servers}
"""
    )
    return Command(argv=(place.executable, "-db", "-f", str(config)))


def _vllm_router(policy: str) -> Callable[[Place], Command]:
    def command(place: Place) -> Command:
        argv = (
            place.executable, "--host", "127.0.0.1", "--port", str(place.port), "--policy", policy,
            "--worker-urls", *_urls(place), "--prometheus-port", str(free_port()), "--log-level", "error",
        )  # fmt: skip
        return Command(argv=argv)

    return command


def _vllm_router_two_legs(place: Place) -> Command:
    prefill, *decode = _urls(place)
    legs = [word for url in decode for word in ("--decode", url)]
    argv = (
        place.executable, "--host", "127.0.0.1", "--port", str(place.port), "--policy", "round_robin",
        "--vllm-pd-disaggregation", "--prefill", prefill, *legs, "--kv-connector", "nixl",
        "--prometheus-port", str(free_port()), "--log-level", "error",
    )  # fmt: skip
    return Command(argv=argv)


def _gateway(place: Place) -> Command:
    argv = (
        place.executable, "launch", "--host", "127.0.0.1", "--port", str(place.port),
        "--policy", "cache_aware", "--worker-urls", *_urls(place),
        "--prometheus-port", str(free_port()), "--log-level", "error",
    )  # fmt: skip
    return Command(argv=argv)


def _dynamo(place: Place) -> Command:
    """Its frontend tokenizes and speaks its own protocol to engines: its mocker stands in for them."""
    model = place.peers / "model" if place.peers is not None else None
    if model is None or not (model / "tokenizer.json").is_file():
        raise RunError("Dynamo needs a model's tokenizer", hint="put one in the folder `model` below --peers")
    store = ("--discovery-backend", "file")
    mocker = (
        place.executable, "-m", "dynamo.mocker", "--model-path", str(model), "--model-name", MODEL,
        "--num-workers", str(len(place.engines)), "--max-model-len", "131072", *store,
    )  # fmt: skip
    frontend = (
        place.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(place.port),
        "--router-mode", "kv", *store,
    )  # fmt: skip
    env = {
        "DYN_FILE_KV": str(place.directory / "kv"), "DYN_REQUEST_PLANE": "tcp", "DYN_EVENT_PLANE": "zmq",
        "DYN_LOG": "error",
    }  # fmt: skip
    return Command(argv=frontend, beside=(mocker,), env=env)


PEERS = (
    Peer(name="nginx", program="nginx", command=_nginx),
    Peer(name="haproxy", program="haproxy", command=_haproxy),
    Peer(name="hpcserve", program="hpcserve", command=_hpcserve),
    Peer(name="hpcserve P/D", program="hpcserve", command=_hpcserve_two_legs(), two_legs=True),
    # Policy kv computes a prompt on the decode worker where that is quicker: one leg. This one never does.
    Peer(
        name="hpcserve P/D both legs",
        program="hpcserve",
        two_legs=True,
        command=_hpcserve_two_legs(policy="round_robin"),
    ),
    # Both legs at once, as SGLang's engines want them.
    Peer(
        name="hpcserve pairs",
        program="hpcserve",
        two_legs=True,
        command=_hpcserve_two_legs("--engine", "sglang"),
    ),
    Peer(name="vllm-router round_robin", program="vllm-router", command=_vllm_router("round_robin")),
    Peer(name="vllm-router cache_aware", program="vllm-router", command=_vllm_router("cache_aware")),
    Peer(name="vllm-router P/D", program="vllm-router", command=_vllm_router_two_legs, two_legs=True),
    Peer(name="sglang-router", program="sglang-router", command=_gateway),
    Peer(name="smg", program="smg", command=_gateway),
    Peer(name="Dynamo kv", program="python:dynamo.frontend", command=_dynamo),
)
