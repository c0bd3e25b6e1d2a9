"""Agents, replicas and workers as the controller knows them: heartbeats in, worker table out.

No clock, no network: times come in as arguments, so every case can be tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ... import engines
from ...engines.base import Engine
from ...plan.plan import Plan, ReplicaPlan
from ..discovery.facts import RankFacts

LOST_AFTER = 3.0
"""Seconds without a heartbeat after which an agent's replicas leave rotation."""

News = tuple[str, dict[str, Any]]
"""An event's name and its fields."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One replica in a heartbeat."""

    name: str
    state: str
    generation: int
    url: str | None = None
    ports: dict[str, int] = msgspec.field(default_factory=dict)
    progress: str | None = None
    ready_seconds: float | None = None
    restarts: int = 0
    restart_in: float | None = None
    failure: dict[str, str] | None = None
    scratch: str | None = None
    """A node's private directory for a replica whose process there another node starts."""


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """The body of `POST /agents/RANK`; unknown fields are a newer agent's."""

    rank: int
    node: str
    pid: int
    replicas: tuple[Entry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A replica in rotation, or one of its data-parallel ranks, as the router is told."""

    name: str
    role: str
    url: str
    generation: int
    ports: Mapping[str, int] = field(default_factory=dict)
    """Its engine's, by name."""
    domain: str | None = None
    """Where KV moves quickest: the NVLink domain, or else the leaf switch, of the node that has the API."""
    replica: str
    node: int
    """The rank of the node that has the API."""
    rank: int | None = None
    """The data-parallel rank; None: the engine chooses among its own."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """What tells the API which of its ranks a request is for."""


@dataclass(slots=True, kw_only=True)
class Replica:
    """What is known about one replica."""

    plan: ReplicaPlan
    entry: Entry | None = None
    """What the agent of its head node said last."""
    members: dict[int, Entry] = field(default_factory=dict)
    """What the agents of its further nodes said last, by rank. Their `generation` is the one of the
    replica's head that they run for."""
    proven: int | None = None
    """Generation that answered a real request."""
    suspect: int | None = None
    """Generation that stopped answering the router."""
    trouble: str | None = None
    """Why it is kept out though it is ready."""
    retry_at: float = 0.0
    """No proof before this time."""

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def rank(self) -> int:
        return self.plan.nodes[0]

    @property
    def generation(self) -> int:
        return self.entry.generation if self.entry else 0


@dataclass(slots=True, kw_only=True)
class Agent:
    rank: int
    node: str
    seen: float | None = None
    lost: bool = False
    done: bool = False
    """All its engines are stopped."""


@dataclass(slots=True)
class Registry:
    """Mutable; only the controller's event loop touches it."""

    plan: Plan
    ranks: tuple[RankFacts, ...]
    agents: dict[int, Agent] = field(init=False)
    replicas: dict[str, Replica] = field(init=False)
    _domains: dict[int, str | None] = field(init=False)
    _engine: Engine = field(init=False)
    _in_rotation: dict[str, tuple[Worker, ...]] = field(init=False, default_factory=dict)
    """By the replica's name."""

    def __post_init__(self) -> None:
        self._engine = engines.of(self.plan.model)
        self.agents = {facts.rank: Agent(rank=facts.rank, node=facts.node) for facts in self.ranks}
        self._domains = {facts.rank: facts.nvlink_domain or facts.leaf_switch for facts in self.ranks}
        self.replicas = {replica.name: Replica(plan=replica) for replica in self.plan.replicas}

    # What comes in. Each returns the events it makes.

    def heartbeat(self, beat: Heartbeat, now: float) -> list[News]:
        """Take one agent's account. Raises KeyError for a rank or replica the plan does not have."""
        agent = self.agents[beat.rank]
        news: list[News] = []
        if agent.lost:
            agent.lost = False
            news.append(("warning", {
                "message": f"the agent on {agent.node} (rank {agent.rank}) is back",
                "hint": "its replicas are tried again before they take requests",
            }))  # fmt: skip
            for replica in self.replicas.values():
                if agent.rank in replica.plan.nodes:
                    replica.proven = None
        agent.seen = now
        agent.done = all(entry.state == "stopped" for entry in beat.replicas)
        for entry in beat.replicas:
            replica = self.replicas[entry.name]
            if replica.rank == beat.rank:
                news += self._update(replica, entry, agent.node)
            elif beat.rank in replica.plan.nodes:
                news += self._update_member(replica, entry, agent)
        return news + self.refresh()

    def _update(self, replica: Replica, entry: Entry, node: str) -> list[News]:
        old, replica.entry = replica.entry, entry
        news: list[News] = []
        if old is None or entry.generation != old.generation:
            replica.suspect, replica.trouble, replica.retry_at = None, None, 0.0
            if entry.generation > 0:
                news.append(("engine-starting", {"replica": entry.name, "node": node}))
            old = None
        if entry.progress is not None and (old is None or entry.progress != old.progress):
            news.append(("engine-loading", {"replica": entry.name, "progress": entry.progress}))
        before = old.state if old else None
        if entry.state == before:
            return news
        if entry.state == "ready":
            seconds = entry.ready_seconds
            news.append(("engine-ready", {"replica": entry.name, "url": entry.url, "seconds": seconds}))
        elif entry.state in ("backoff", "failed") and entry.failure is not None:
            fields = {key: entry.failure.get(key) for key in ("cause", "message", "hint")}
            again = entry.restart_in if entry.state == "backoff" else None
            news.append(("engine-died", {"replica": entry.name, **fields, "restart_in": again}))
        return news

    def _update_member(self, replica: Replica, entry: Entry, agent: Agent) -> list[News]:
        old = replica.members.get(agent.rank)
        replica.members[agent.rank] = entry
        dead = entry.state in ("backoff", "failed") and entry.failure is not None
        if not dead or (old is not None and (old.state, old.generation) == (entry.state, entry.generation)):
            return []
        failure = entry.failure or {}
        message = f"its process on {agent.node} (rank {agent.rank}) ended: {failure.get('message')}"
        fields = {"cause": failure.get("cause"), "message": message, "hint": failure.get("hint")}
        return [("engine-died", {"replica": replica.name, **fields, "restart_in": None})]

    def excuse(self, seconds: float) -> None:
        """The controller itself was not running for so long: heartbeats may lie unread."""
        for agent in self.agents.values():
            if agent.seen is not None:
                agent.seen += seconds

    def expire(self, now: float) -> list[News]:
        """Mark agents as lost that were silent for too long."""
        news: list[News] = []
        for agent in self.agents.values():
            if agent.seen is not None and not agent.lost and not agent.done and now - agent.seen > LOST_AFTER:
                agent.lost = True
                news.append(("warning", {
                    "message": f"no heartbeat from {agent.node} (rank {agent.rank}) for {LOST_AFTER:g} s",
                    "hint": "its replicas are out of rotation; the job goes on with the others",
                }))  # fmt: skip
        return news + self.refresh()

    def prove(self, name: str, generation: int) -> list[News]:
        """A real request went through this start of the replica."""
        replica = self.replicas[name]
        replica.proven, replica.trouble, replica.suspect = generation, None, None
        return self.refresh()

    def keep_out(self, name: str, reason: str, retry_at: float) -> list[News]:
        """A proof failed: out of rotation, and not tried again before `retry_at`."""
        replica = self.replicas[name]
        replica.proven, replica.trouble, replica.retry_at = None, reason, retry_at
        return self.refresh()

    def suspect(self, name: str, reason: str) -> list[News]:
        """The router's requests to this replica fail, and so does a look at it."""
        replica = self.replicas[name]
        replica.suspect, replica.proven, replica.trouble = replica.generation, None, reason
        return self.refresh()

    def refresh(self) -> list[News]:
        """Compute the worker table; the events are its changes. A replica's ranks come and go together."""
        table = {replica.name: workers for replica in self.ready() if (workers := self._eligible(replica))}
        news: list[News] = []
        for name, old in self._in_rotation.items():
            if table.get(name) != old:
                news.append(("worker-out", {"replica": name, "reason": self.why_out(self.replicas[name])}))
        for name, new in table.items():
            if self._in_rotation.get(name) != new:
                news.append(("worker-in", {"replica": name}))
        self._in_rotation = table
        return news

    # What goes out.

    def workers(self) -> tuple[Worker, ...]:
        """The worker table."""
        return tuple(worker for workers in self._in_rotation.values() for worker in workers)

    def workers_of(self, replica: Replica) -> tuple[Worker, ...]:
        """What a replica that answers is, or would be, in the table."""
        entry = replica.entry
        assert entry is not None and entry.url is not None, "only replicas that answer come here"
        ranks = self._engine.routed_ranks(replica.plan)
        if not ranks:
            return (self._worker(replica, replica.name, 0),)
        return tuple(
            self._worker(
                replica, replica.plan.rank_name(each.rank), each.node, rank=each.rank, headers=each.headers
            )
            for each in ranks
        )

    def _worker(self, replica: Replica, name: str, place: int, **more: Any) -> Worker:
        entry, node = self._entry(replica, place), replica.plan.nodes[place]
        assert entry is not None and entry.url is not None
        return Worker(
            name=name,
            role=replica.plan.role,
            url=entry.url,
            generation=replica.generation,
            ports=entry.ports,
            domain=self._domains.get(node),
            replica=replica.name,
            node=node,
            **more,
        )

    def replica_of(self, worker: str) -> Replica:
        """The replica that a worker is, or is a rank of. Raises KeyError for a name that is none."""
        name, _, rank = worker.partition("#")
        replica = self.replicas[name]
        if rank and worker not in map(replica.plan.rank_name, range(replica.plan.data_parallel)):
            raise KeyError(worker)
        return replica

    def ready(self) -> tuple[Replica, ...]:
        """Replicas whose engine answers, in the order of the plan."""
        return tuple(replica for replica in self.replicas.values() if self._answers(replica))

    def unproven(self, now: float) -> tuple[Replica, ...]:
        """Replicas that are to be tried with a real request before they take others'."""
        return tuple(
            replica
            for replica in self.ready()
            if replica.proven != replica.generation and replica.retry_at <= now
        )

    def usable(self) -> bool:
        """Can a client be answered? A decode or an aggregated replica is enough for that."""
        return any(worker.role != "prefill" for worker in self.workers())

    def hopeless(self) -> bool:
        """Nothing can answer any more: each replica is given up, or its agent is lost."""
        return all(
            self.lost(replica) or (replica.entry is not None and replica.entry.state == "failed")
            for replica in self.replicas.values()
            if replica.plan.role != "prefill"
        )

    def roles_to_come(self) -> set[str]:
        """Roles with a replica that answers or may yet: its agents are there and it is not given up."""
        return {
            replica.plan.role
            for replica in self.replicas.values()
            if not self.lost(replica) and (replica.entry is None or replica.entry.state != "failed")
        }

    def silent(self) -> tuple[Agent, ...]:
        """Agents never heard of."""
        return tuple(agent for agent in self.agents.values() if agent.seen is None)

    def over(self) -> bool:
        """No agent has an engine running, as far as anybody can tell."""
        return all(agent.done or agent.lost or agent.seen is None for agent in self.agents.values())

    def orders(self, rank: int) -> dict[str, Any]:
        """For the agent of `rank`: what it must know of the replicas that it has a part in."""
        return {
            "leaders": self.leaders(rank),
            "restart": self.restarts(rank),
            "seats": self.seats(rank),
        }

    def leaders(self, rank: int) -> dict[str, dict[str, Any]]:
        """For the agent of `rank`: generation and ports of the heads of replicas whose further process
        it carries, and whether these replicas answer. One whose head is not running is not in it."""
        found = {}
        for replica in self.replicas.values():
            if rank in replica.plan.nodes[1:] and replica.entry is not None and replica.entry.ports:
                found[replica.name] = {
                    "generation": replica.generation,
                    "ports": replica.entry.ports,
                    "ready": self._answers(replica),
                }
        return found

    def seats(self, rank: int) -> dict[str, dict[int, str]]:
        """For the agent of `rank`: the further nodes of its replicas that wait for the replica's step, by
        rank, with their directories. A node whose agent is lost or has ended is not among them."""
        found: dict[str, dict[int, str]] = {}
        for replica in self.replicas.values():
            if replica.rank != rank:
                continue
            for member, entry in replica.members.items():
                agent = self.agents[member]
                if entry.scratch is not None and not agent.lost and not agent.done:
                    found.setdefault(replica.name, {})[member] = entry.scratch
        return found

    def restarts(self, rank: int) -> dict[str, dict[str, Any]]:
        """For the agent of `rank`: replica heads to be started again, because a further process of
        theirs is dead. Processes of one replica live and die together."""
        found = {}
        for replica in self.replicas.values():
            if replica.rank == rank and replica.entry is not None and replica.entry.ports:
                for member, entry in replica.members.items():
                    if entry.generation == replica.generation and entry.state in ("backoff", "failed"):
                        found[replica.name] = {
                            "generation": replica.generation,
                            "node": self.agents[member].node,
                            "final": entry.state == "failed",
                            **(entry.failure or {}),
                        }
        return found

    def why_out(self, replica: Replica) -> str:
        """In words, why a replica takes no requests."""
        agent = self.agents[replica.rank]
        if agent.seen is None:
            return f"the agent on {agent.node} has not reported yet"
        lost = next((self.agents[rank] for rank in replica.plan.nodes if self.agents[rank].lost), None)
        if lost is not None:
            return f"no heartbeat from {lost.node} for {LOST_AFTER:g} s"
        entry = replica.entry
        if entry is None:
            return "its engine has not started"
        if replica.trouble is not None and entry.state == "ready":
            return replica.trouble
        if self._answers(replica):
            return "it has not answered a test request yet"
        if entry.failure is not None and entry.state in ("backoff", "failed"):
            return entry.failure.get("message", entry.state)
        if entry.state == "ready":
            return "its processes on other nodes are not ready"
        return f"its engine is {entry.state}"

    def lost(self, replica: Replica) -> bool:
        """Is the agent of one of its nodes lost?"""
        return any(self.agents[rank].lost for rank in replica.plan.nodes)

    def _answers(self, replica: Replica) -> bool:
        return self.all_are(replica, "ready", "draining") and not self.lost(replica)

    def all_are(self, replica: Replica, *states: str) -> bool:
        """Are all processes of its present start that have an API in one of these states?"""
        for place in self._engine.api_nodes(replica.plan):
            entry = self._entry(replica, place)
            if entry is None or entry.state not in states or entry.generation != replica.generation:
                return False
        return True

    def _entry(self, replica: Replica, place: int) -> Entry | None:
        """What the agent of one of the replica's nodes said last."""
        return replica.members.get(replica.plan.nodes[place]) if place else replica.entry

    def _eligible(self, replica: Replica) -> tuple[Worker, ...]:
        if replica.entry is None or replica.entry.url is None or replica.proven != replica.generation:
            return ()
        return self.workers_of(replica)

    def describe(self) -> list[Mapping[str, Any]]:
        """All replicas for `GET /status`."""
        return [
            {
                "name": replica.name,
                "role": replica.plan.role,
                "rank": replica.rank,
                "node": self.agents[replica.rank].node,
                "state": self._state(replica),
                "url": replica.entry.url if replica.entry else None,
                "generation": replica.generation,
                "progress": replica.entry.progress if replica.entry else None,
                "ready_seconds": replica.entry.ready_seconds if replica.entry else None,
                "restarts": replica.entry.restarts if replica.entry else 0,
                "failure": replica.entry.failure if replica.entry else None,
                "in_rotation": replica.name in self._in_rotation,
                "reason": None if replica.name in self._in_rotation else self.why_out(replica),
            }
            for replica in self.replicas.values()
        ]

    def _state(self, replica: Replica) -> str:
        if self.lost(replica):
            return "lost"
        return replica.entry.state if replica.entry else "starting"
