"""The router's configuration file: JSON without secrets, written by the head node."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ..config.model import Role
from ..engines.kv_events.endpoints import EventEndpoint
from ..errors import ConfigError
from ..rundir.atomic import storage_error
from .keys.usage_file import UsageConfig


class WorkerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A replica as the head announces it."""

    name: str
    role: Role
    url: str
    """`http://HOST:PORT`, without a path."""
    ports: Mapping[str, int] = {}
    """Its engine's ports by name, as in `Engine.ports()`."""
    generation: int = 0
    """Grows at each start of the engine."""
    replica: str | None = None
    """The replica that it is, or is a data-parallel rank of; None: one of its own."""
    rank: int | None = None
    """Which rank of it, as the engine's metrics count them."""
    headers: Mapping[str, str] = {}
    """Sent along with each request, where several workers have one URL."""
    slot: int | None = None
    """Its place on the board of shared loads; given by the supervisor."""
    domain: str | None = None
    """NVLink domain or leaf switch; None: not known."""
    models: tuple[Mapping[str, Any], ...] = ()
    """The entries of its own /v1/models, adapters with their `parent`; asked by the supervisor."""


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file as written."""

    served_name: str
    engine: str
    host: str = "127.0.0.1"
    # Limits are checked in `_ports`: msgspec 0.22.0 crashes on a union of limited ints and a tuple of them.
    port: int | list[int] = 0
    api_key_file: str | None = None
    job_key_file: str | None = None
    policy: str = "kv"
    max_body: Annotated[int, msgspec.Meta(gt=0)] = 64 * 1024 * 1024
    first_byte_timeout: Annotated[float, msgspec.Meta(gt=0)] = 600.0
    retries: Annotated[int, msgspec.Meta(ge=0, le=10)] = 2
    kv_lease: Annotated[float, msgspec.Meta(gt=0)] = 30.0
    processes: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    queue_seconds: Annotated[float, msgspec.Meta(gt=0)] = 2.0
    keys: str | None = None
    usage: UsageConfig | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    unix_socket: str | None = None
    kv_events: Mapping[str, Sequence[tuple[str, str | None]]] = {}
    batch_api: str | None = None
    workers: Sequence[WorkerSpec] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Everything the router is told at its start. Sizes are bytes, times seconds."""

    served_name: str
    engine: str
    host: str = "127.0.0.1"
    ports: tuple[int, int] = (0, 0)
    """First and last port to try; (0, 0) takes any free one."""
    api_key: str | None = None
    """What clients must send; None lets everyone in."""
    job_key: str | None = None
    """What engines are sent."""
    policy: str = "kv"
    """One of `placement.policies.POLICIES`."""
    max_body: int = 64 * 1024 * 1024
    first_byte_timeout: float = 600.0
    """From choosing a worker to the first byte of its stream, or to the end of a prefill leg."""
    retries: int = 2
    kv_lease: float = 30.0
    """How long a prefill engine keeps the KV blocks of an answered prompt."""
    processes: int = 1
    """Relays on one port."""
    queue_seconds: float = 2.0
    """Longest wait a request may expect when the engines are full; what would wait longer is refused."""
    keys: Path | None = None
    """Directory of keys that are good besides `api_key`; it may come later."""
    usage: UsageConfig | None = None
    """Where to write down what each key used."""
    tls_cert: Path | None = None
    """PEM file with the certificate chain; with one, clients must speak TLS."""
    tls_key: Path | None = None
    """PEM file with its private key; None: it is in `tls_cert`."""
    unix_socket: Path | None = None
    """A socket to listen on as well as on the port."""
    kv_events: Mapping[str, tuple[EventEndpoint, ...]] = field(default_factory=dict)
    """Where workers without an agent publish KV events, for each data-parallel rank."""
    batch_api: Path | None = None
    """Where the process of the Batch API writes its address; None: there is no such process."""
    workers: tuple[WorkerSpec, ...] = ()


def load(path: Path) -> RouterConfig:
    """Read the configuration and the key files it names. Raises ConfigError and StorageError."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise storage_error(error, "read") from error
    try:
        file = msgspec.json.decode(raw, type=_File)
    except msgspec.MsgspecError as error:
        hint = "the head node writes this file; start the run again"
        raise ConfigError(f"{path}: {error}", hint=hint) from error
    ports = _ports(path, file.port)
    _check_policy(path, file.policy)
    return RouterConfig(
        served_name=file.served_name,
        engine=file.engine,
        host=file.host,
        ports=ports,
        api_key=_key(file.api_key_file),
        job_key=_key(file.job_key_file),
        policy=file.policy,
        max_body=file.max_body,
        first_byte_timeout=file.first_byte_timeout,
        retries=file.retries,
        kv_lease=file.kv_lease,
        processes=file.processes,
        queue_seconds=file.queue_seconds,
        keys=_path(file.keys),
        usage=file.usage,
        tls_cert=_path(file.tls_cert),
        tls_key=_path(file.tls_key),
        unix_socket=_path(file.unix_socket),
        kv_events={
            worker: tuple(EventEndpoint(events=events, replay=replay) for events, replay in ranks)
            for worker, ranks in file.kv_events.items()
        },
        batch_api=_path(file.batch_api),
        workers=tuple(file.workers),
    )


def _ports(path: Path, port: int | list[int]) -> tuple[int, int]:
    ends = [port, port] if isinstance(port, int) else port
    if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= 65535:
        raise ConfigError(f"{path}: port is {port}", hint="give one port or [low, high], 0 to 65535")
    return ends[0], ends[1]


def _check_policy(path: Path, name: str) -> None:
    from .placement.policies import POLICIES

    if name not in POLICIES:
        hint = "it is called least_load now" if name == "least_in_flight" else None
        near = difflib.get_close_matches(name, POLICIES, n=1)
        raise ConfigError(
            f"{path}: policy must be one of {', '.join(POLICIES)}, not {name!r}",
            hint=hint or (f"did you mean {near[0]}?" if near else "leave it out for the default, kv"),
        )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _key(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        key = Path(path).read_text(encoding="ascii").strip()
    except OSError as error:
        raise storage_error(error, "read") from error
    except UnicodeDecodeError:
        key = ""
    if not key or not key.isprintable():
        raise ConfigError(f"{path} holds no usable key", hint="a key is one line of printable ASCII")
    return key
