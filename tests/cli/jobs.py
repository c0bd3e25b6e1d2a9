"""What a job leaves in its run directory, as shell for `FakeSlurm.runs`, and servers that play its own."""

from __future__ import annotations

import json
import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .conftest import World

RUNNING = "42|RUNNING|1790000000|1990003600|n[1-4]|None"


def writes_events(*events: dict[str, Any]) -> str:
    lines = "".join(json.dumps({"t": time.time(), **event}) + "\n" for event in events)
    return f'printf %s {shlex.quote(lines)} >> "$run/events.jsonl"\n'


def writes(name: str, text: str) -> str:
    return f'printf %s {shlex.quote(text)} > "$run/{name}"\n'


def endpoint(url: str = "http://127.0.0.1:20000/v1", **fields: Any) -> str:
    host, _, port = url.split("/")[2].partition(":")
    document = {
        "url": url,
        "host": host,
        "port": int(port),
        "served_name": "tiny",
        "key_file": None,
        "ready_seconds": 1.5,
        "end_time": time.time() + 3600,
        **fields,
    }
    return writes("endpoint.json", json.dumps(document))


def becomes_ready(url: str = "http://127.0.0.1:20000/v1", **fields: Any) -> str:
    """A whole successful start."""
    return endpoint(url, **fields) + writes_events(
        {"event": "job-started", "node": "n1", "slurm_job_id": "42", "end_time": time.time() + 3600},
        {"event": "rendezvous", "transport": "mpi", "ranks": 4, "seconds": 0.5},
        {"event": "warning", "message": "KV blocks cross TCP", "hint": "see docs"},
        *(
            {"event": "engine-ready", "replica": name, "url": "http://x", "seconds": 1.0}
            for name in ("prefill-0", "prefill-1", "decode-0", "decode-1")
        ),
        {
            "event": "kv-path",
            "prefill": "prefill-0",
            "decode": "decode-0",
            "bytes": 4096,
            "seconds": 0.1,
            "ok": True,
        },
        {"event": "first-token", "seconds": 0.2},
        {"event": "ready", "seconds": 1.5, "url": url},
    )


def submit(world: World, name: str = "eval", job: str = "", shows: str = RUNNING) -> None:
    world.slurm.runs(job or "true\n")
    assert world("launch", "--nodes", "4", "--name", name, "--no-wait", "model.yaml").status == 0
    world.slurm.shows(shows)


class _Quiet(BaseHTTPRequestHandler):
    asked: list[str]
    status: dict[str, Any]
    key: str

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(json.dumps(self.status).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.endswith("/chat/completions"):
            self.asked.append(body.decode())
            pieces = ["The capital ", "is Paris", "."]
            events = [json.dumps({"choices": [{"delta": {"content": piece}}]}) for piece in pieces]
            self._answer("".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode())
        else:
            self._answer(b"{}")

    def _answer(self, body: bytes) -> None:
        right = self.headers.get("Authorization") == f"Bearer {self.key}"
        if self.path != "/v1/chat/completions":
            self.asked.append(f"{self.command} {self.path}")
        self.send_response(200 if right else 401)
        body = body if right else b'{"error": {"message": "wrong key"}}'
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def answering(key: str, status: dict[str, Any] | None = None) -> Iterator[tuple[int, list[str]]]:
    """An HTTP server that plays controller and endpoint; gives its port and what it was asked."""
    handler = type("Handler", (_Quiet,), {"asked": [], "status": status or {}, "key": key})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address[1], handler.asked  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def secret(world: World, key: str, name: str = "eval") -> str:
    return (world.runs / name / "secrets" / key).read_text().strip()


def head(world: World, port: int, name: str = "eval") -> None:
    document = {"node": "n1", "address": "127.0.0.1", "port": port, "pid": 1, "started": 0}
    (world.runs / name / "head.json").write_text(json.dumps(document))
