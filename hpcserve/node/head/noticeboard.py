"""What the head lets the outside know: head.json, endpoint.json, the time line and `GET /status`."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ...errors import StorageError
from ...rundir.atomic import write_json
from ..console import say, warn
from ..discovery.addresses import in_url
from ..discovery.facts import Roster
from ..inputs import Inputs
from .registry import Registry, Worker
from .router_process import RouterStats


class Noticeboard:
    def __init__(self, inputs: Inputs, roster: Roster, *, started: float, end_time: float | None) -> None:
        self._inputs = inputs
        self._plan = inputs.plan
        self._roster = roster
        self._end_time = end_time
        self.started = started
        """Unix seconds at which the job script began."""
        self.state = "starting"
        self.reason: str | None = None
        """Why it drains or stops."""
        self.endpoint: tuple[str, int] | None = None
        """Where the router listens."""
        self._timeline: dict[str, float] = {"job-started": started}

    def mark(self, name: str) -> None:
        """Enter a moment in the time line."""
        self._timeline[name] = round(time.time(), 3)

    @property
    def url(self) -> str:
        assert self.endpoint is not None, "asked for before the router listened"
        host, port = self.endpoint
        return f"http://{in_url(host)}:{port}/v1"

    def publish_head(self, address: str, port: int) -> None:
        """head.json: where the controller is. Raises StorageError: without it no agent finds the head."""
        head = {
            "node": socket.gethostname(),
            "address": address,
            "port": port,
            "pid": os.getpid(),
            "started": round(time.time(), 3),
            "attempt": self._inputs.attempt,
        }
        write_json(self._inputs.run.head, head)

    def publish_ready(self) -> Mapping[str, Any]:
        """endpoint.json and the time line, on READY; returns the fields of the `ready` event.

        Raises StorageError: an endpoint that nobody can find is no endpoint.
        """
        self.mark("ready")
        self._write_endpoint()
        say(f"READY after {self._ready_seconds():.1f} s: {self.url}")
        before = self.started
        for name, when in self._timeline.items():
            say(f"  {when - self.started:8.2f} s  +{when - before:.2f} s  {name}")
            before = when
        return {"seconds": self._ready_seconds(), "url": self.url, "timeline": self._timeline}

    def publish_move(self) -> None:
        """The router listens elsewhere now."""
        if "ready" not in self._timeline:
            return
        try:
            self._write_endpoint()
        except StorageError as error:
            warn(f"endpoint.json still has the old address: {error.message}", error.hint)

    def withdraw(self) -> None:
        """Nobody is to find the endpoint any more."""
        try:
            self._inputs.run.endpoint.unlink(missing_ok=True)
        except OSError as error:
            warn(f"endpoint.json can't be removed: {error.strerror}")

    def _ready_seconds(self) -> float:
        return round(self._timeline["ready"] - self.started, 3)

    def _write_endpoint(self) -> None:
        assert self.endpoint is not None, "asked for before the router listened"
        host, port = self.endpoint
        endpoint = {
            "url": self.url,
            "host": host,
            "port": port,
            "served_name": self._plan.served_name,
            "key_file": str(self._inputs.run.api_key) if self._plan.model.router.auth else None,
            "ready_seconds": self._ready_seconds(),
            "end_time": self._end_time,
        }
        write_json(self._inputs.run.endpoint, endpoint)

    def table(self, registry: Registry) -> Mapping[str, Any]:
        """The worker table, as the router is told."""
        return {
            "state": self.state if self.state in ("starting", "ready") else "draining",
            "reason": self.reason,
            "retry_after": None,
            "end_time": self._end_time,
            "workers": [_announced(worker) for worker in registry.workers()],
        }

    def status(self, registry: Registry, stats: RouterStats) -> Mapping[str, Any]:
        """The answer to `GET /status`."""
        busy = stats.workers
        return {
            "state": self.state,
            "reason": self.reason,
            "plan": {
                "name": self._plan.name,
                "served_name": self._plan.served_name,
                "engine": self._plan.model.engine,
                "nodes": self._plan.nodes,
                "replicas": len(self._plan.replicas),
                "disaggregated": self._plan.disaggregated,
            },
            "transport": self._roster.transport,
            "url": self.url if self.endpoint else None,
            "replicas": registry.describe(),
            "workers": [
                {**asdict(worker), "in_flight": busy.get(worker.name, {}).get("in_flight", 0)}
                for worker in registry.workers()
            ],
            "router": {"in_flight": stats.in_flight, "requests": stats.requests, "errors": stats.errors},
            "end_time": self._end_time,
            "timeline": self._timeline,
        }


def _announced(worker: Worker) -> Mapping[str, Any]:
    """A worker as the router knows it; on which node it is, is not the router's business."""
    fields = asdict(worker)
    del fields["node"]
    return fields
