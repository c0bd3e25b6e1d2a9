"""What hpcserve asks of an engine: one class per engine, and nothing about engines elsewhere.

A run's engine is `engines.of(model)`; the router is told its name, and gets it by `engines.get(name)`. The
same `command()` serves `--dry-run`, where addresses and ports are shell variables, and the agent, where they
are real.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:  # the fake engine starts 64 times on one machine and needs no plan
    from ..plan.plan import Plan, ReplicaPlan
    from .kv_events.endpoints import EventEndpoint

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineContext:
    """Where one process of a replica runs. Values are text so that a dry run can put `$NAMES` in."""

    plan: Plan
    replica: ReplicaPlan
    node: int
    """This process's place among the replica's nodes: 0 is the replica's head."""
    address: str
    """Address of this node that the other nodes reach."""
    head_address: str
    """Address of the replica's head node."""
    ports: Mapping[str, str]
    """One bound port (or first of a block) per name in `Engine.ports()`."""
    model_path: str
    """Hub id or path, byte-identical on all replicas of the job."""
    cpus: tuple[tuple[int, ...], ...] = ()
    """On `device: cpu`, the cores of each worker of this process; empty lets the engine decide."""
    gpu_names: tuple[str, ...] = ()
    """The job's GPUs on this node as CUDA_VISIBLE_DEVICES names them; `replica.gpus` counts these.
    Empty: the names are the numbers."""
    fabric_env: Mapping[str, str] = field(default_factory=dict)
    """Transport variables found on the node, such as UCX_NET_DEVICES."""
    kv_over_nvlink: bool = False
    """KV blocks cross NVLink to other nodes, so they must lie in memory that can be shared that way."""
    python: str = "python"
    scratch: str = "$TMPDIR"
    """Node-local private directory of this replica."""
    run_dir: str = "$RUN_DIR"
    start: str = "$START"
    """Names this start of the replica: the same for all its processes, and never used again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedRank:
    """A data-parallel rank that requests can be sent to by name: a worker of its own for the router."""

    rank: int
    """Among all of the replica's; the engine's metrics and KV events count them so."""
    node: int
    """The process that takes its requests, by its place among the replica's nodes."""
    headers: Mapping[str, str]
    """What tells that process which of its ranks a request is for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCommand:
    """A process to start: `argv` without secrets, `env` added to the scrubbed environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Secrets are not here: the agent adds the job key under `Engine.key_variable`."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Texts the process reads, by name below `scratch`. The agent writes them, for its own user alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What an engine's log says about its death."""

    cause: str
    """`port-taken`, `out-of-memory`, `model-missing`, `bad-flag`, `kv-directory`, `disk-full`, `mpi`, `nixl`,
    `unknown`."""
    message: str
    hint: str
    retry: bool
    """False: starting it again can't help."""


class Engine(ABC):
    """One engine program."""

    name: ClassVar[str]
    """As in model.yaml; a variant of that engine (`configured`) has one of its own, by which the router gets
    it."""
    key_variable: ClassVar[str]
    """Environment variable the engine reads its API key from."""
    nvlink_flag: ClassVar[str | None] = None
    """What its command gets where KV blocks cross NVLink to other nodes."""
    health_path: ClassVar[str] = "/health"
    metrics_path: ClassVar[str] = "/metrics"
    metrics_wait: ClassVar[float] = 0.0
    """Seconds that `metrics_path` may wait for something to tell. Meanwhile the engine may answer nobody,
    so it is read only while it has requests."""
    mpi_launcher: ClassVar[str | None] = None
    """A replica over several nodes is one MPI program: its head starts it as a Slurm step, in which every
    task runs this program with the engine's command, and its other nodes start nothing. The program runs
    the command in the first task only. None: a process for each node."""
    shared_ports: ClassVar[frozenset[str]] = frozenset()
    """Names of ports that the replica's head binds and all its processes must be told."""

    def configured(self, engine_args: Mapping[str, Any]) -> Engine:
        """The engine as the top-level `engine_args` make it. Raises ConfigError."""
        return self

    @abstractmethod
    def ports(self, replica: ReplicaPlan) -> Mapping[str, int]:
        """Ports one process needs: name -> how many in a row. `http` is always among them."""

    @abstractmethod
    def command(self, context: EngineContext) -> EngineCommand:
        """How to start one process of a replica."""

    def in_step(self, replica: ReplicaPlan) -> bool:
        """Is this replica one MPI program in a step of its own?"""
        return self.mpi_launcher is not None and len(replica.nodes) > 1

    def routed_ranks(self, replica: ReplicaPlan) -> tuple[RoutedRank, ...]:
        """All data-parallel ranks, for the router to choose from; () where the engine chooses itself."""
        return ()

    def api_nodes(self, replica: ReplicaPlan) -> frozenset[int]:
        """Processes of a replica that have an API, by their place among its nodes."""
        return frozenset({0, *(each.node for each in self.routed_ranks(replica))})

    @abstractmethod
    def progress(self, line: str) -> str | None:
        """What a log line says about loading (`weights 3/8`), for people; None if nothing."""

    @abstractmethod
    def diagnose(self, log_tail: str, exit_status: int | None) -> Failure:
        """Why the engine died, from its last log lines. `exit_status` is negative for a signal."""

    # The two-leg protocol: prompt on a prefill replica, answer on a decode replica. Either one leg after the
    # other, or, where `paired`, both at once.

    paired: ClassVar[bool] = False
    """Both legs are sent at once, and the replicas find each other. Decode replicas compute no prompts."""

    def prefill_request(self, body: Json) -> Json:
        """The body for the prefill leg of a client's request."""
        raise NotImplementedError

    def decode_request(self, body: Json, prefill_response: Json) -> Json:
        """The body for the decode leg. Raises KeyError when the prefill leg kept no KV blocks."""
        raise NotImplementedError

    def early_answer(self, prefill_response: Json, *, stream: bool) -> bytes | None:
        """The client's answer, where it ended with the prefill leg's token: JSON, or the events of a stream,
        usage included. None: decode writes it. Raises KeyError for a response that is no answer."""
        return None

    recomputes: ClassVar[bool] = True
    """A decode replica whose KV blocks do not come computes the prompt itself."""

    def transfer_failed(self, status: int, body: bytes) -> bool:
        """Does a decode replica say that the KV blocks did not come? `body` is the answer's first piece.

        Beyond a status of 500, which may be about that with any engine.
        """
        return False

    def pair_requests(self, body: Json, *, url: str, ports: Mapping[str, int]) -> tuple[Json, Json]:
        """The bodies for prefill and decode, each time with a meeting place of their own. `url` and `ports`
        are the prefill replica's."""
        raise NotImplementedError

    def pair_obstacle(self, member: Callable[[str], Any]) -> str | None:
        """The part of a client's request that a pair can't answer; `member(name)` is one of its members."""
        return None

    router_members: ClassVar[tuple[str, ...]] = ()
    """Members of a request that tell a replica whom to connect to: no client may set them."""

    # An answer that goes on at another replica. Bodies are decoded; the paths are the engine's own.

    can_resume: ClassVar[bool] = False
    """The methods below may be called."""

    def names_tokens(self, *, chat: bool) -> bool:
        """Can streams be asked for `return_token_ids`, those of chats or those of completions?"""
        return self.can_resume

    resume_path: ClassVar[str] = "/v1/completions"
    tokenize_path: ClassVar[str] = "/tokenize"
    detokenize_path: ClassVar[str] = "/detokenize"
    detokenized_member: ClassVar[str] = "prompt"
    """The member of that path's answer that is the text."""
    text_ends_with_token: ClassVar[bool] = True
    """Text that a stream wrote with one token ends where the token's own text does, but for stop strings."""
    stop_member: ClassVar[str] = "stop_reason"
    """The member of a choice that names the stop string or token that ended the answer."""
    models_path: ClassVar[str] = "/v1/models"

    def resume_obstacle(self, body: Json, sent: str) -> str | None:
        """The part of a client's request that keeps another replica from going on in the middle, where the
        client has had the text `sent`."""
        return "the engine"

    def tokenize_request(self, body: Json) -> Json | None:
        """What `tokenize_path` is asked for a request's prompt, as `tokens`; None: it can't tell."""
        return None

    def answer_budget(self, body: Json) -> int | None:
        """The most tokens a request's answer may have; None: as many as the context has room for."""
        return None

    def resume_request(self, body: Json, prompt: Any, *, generated: int, max_tokens: int) -> Json:
        """What `resume_path` is asked. `prompt` is a JSON array of all token ids so far, raw; `generated` of
        them are the answer's, and `max_tokens` may follow."""
        raise NotImplementedError

    def kv_event_endpoints(self, context: EngineContext) -> tuple[EventEndpoint, ...]:
        """Where this replica's KV events are read, by data-parallel rank; () where it publishes none."""
        return ()

    def disk_tier(self, context: EngineContext) -> tuple[str, int] | None:
        """The directory on the node where this process keeps KV blocks, one per file, and the bytes they may
        take; None: it keeps none there."""
        return None

    def shared_memory(self, context: EngineContext) -> tuple[str, ...]:
        """Names of files in /dev/shm that this process leaves there when it is killed."""
        return ()

    kv_counted_by: ClassVar[Literal["prefill", "decode"]] = "decode"
    """Whose metrics tell how much KV has passed."""

    @abstractmethod
    def kv_bytes_received(self, metrics: str, rank: int | None = None) -> float | None:
        """Bytes of KV that decode replicas have so far from, or by, the one whose /metrics text this is
        (`kv_counted_by`), or that one of its routed ranks has; None if it can't tell."""
