"""The router as the head node runs it: a process with a control line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.patience import DEADLINE

KEY = "sk-1234"


class Engine(ThreadingHTTPServer):
    """Answers with one chunk, waits for `release`, answers with the rest."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.release = threading.Event()
        self.asked = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Engine

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(OSError):
            self._chunk(b"data: 1\n\n")
            self.server.asked.set()
            self.server.release.wait(DEADLINE)
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Running:
    """A router process and the head's end of its control line."""

    def __init__(self, tmp_path: Path, **settings: Any) -> None:
        key = tmp_path / "key"
        key.write_text(KEY + "\n")
        config = tmp_path / "router.json"
        defaults = {
            "host": "127.0.0.1", "port": 0, "api_key_file": str(key), "job_key_file": None, "engine": "fake",
            "served_name": "toy", "policy": "round_robin", "max_body": 1000000, "first_byte_timeout": 60,
            "retries": 1, "kv_lease": 30,
        }  # fmt: skip
        config.write_text(json.dumps(defaults | settings))
        self.log = tmp_path / "log"
        self.control, theirs = socket.socketpair()
        self.control.settimeout(DEADLINE)
        with theirs, self.log.open("wb") as log:
            argv = [sys.executable, "-m", "hpcserve.router", "--config", str(config)]
            self.process = subprocess.Popen(
                [*argv, "--control-fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdout=log,
                stderr=log,
            )
        self.lines = self.control.makefile("rb")

    def hear(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The next message of this kind with these fields."""
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            line = self.lines.readline()
            if not line:
                raise AssertionError(f"the router hung up before {kind}:\n{self.log.read_text()}")
            message: dict[str, Any] = json.loads(line)
            if message["type"] == kind and all(message[key] == value for key, value in fields.items()):
                return message
        raise AssertionError(f"no {kind} {fields}, last: {message}")

    def tell(self, message: dict[str, Any]) -> None:
        self.control.sendall(json.dumps(message).encode() + b"\n")

    def table(self, engine: Engine) -> None:
        url = f"http://127.0.0.1:{engine.server_port}"
        worker = {"name": "aggregated-0", "role": "aggregated", "url": url, "generation": 0}
        message = {"type": "workers", "state": "ready", "reason": None, "retry_after": None, "end_time": None}
        self.tell({**message, "workers": [worker]})

    def stop(self) -> None:
        self.lines.close()
        self.control.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE)


@pytest.fixture
def engine() -> Iterator[Engine]:
    server = Engine()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    router = Running(tmp_path)
    yield router
    router.stop()


def _ask(port: int) -> requests.Response:
    return requests.post(
        f"http://127.0.0.1:{port}/v1/completions",
        json={"model": "toy", "prompt": "x", "stream": True},
        headers={"authorization": f"Bearer {KEY}"},
        timeout=DEADLINE,
        stream=True,
    )


def _in_flight(running: Running, engine: Engine) -> tuple[int, requests.Response, Iterator[bytes]]:
    port = running.hear("listening")["port"]
    assert requests.get(f"http://127.0.0.1:{port}/health", timeout=DEADLINE).status_code == 503
    running.table(engine)
    running.hear("stats", workers={"aggregated-0": {"in_flight": 0}})
    response = _ask(port)
    pieces = response.iter_content(None)
    assert next(pieces) == b"data: 1\n\n"
    running.hear("stats", in_flight=1, requests=1, workers={"aggregated-0": {"in_flight": 1}})
    return port, response, pieces


@pytest.mark.parametrize("how", ["drain", "hang up", "SIGTERM"])
def test_drains_then_exits(running: Running, engine: Engine, how: str) -> None:
    port, response, pieces = _in_flight(running, engine)
    if how == "drain":
        running.tell({"type": "drain"})
    elif how == "hang up":
        running.control.shutdown(socket.SHUT_WR)
    else:
        running.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + DEADLINE
    while (health := requests.get(f"http://127.0.0.1:{port}/health", timeout=DEADLINE)).status_code == 200:
        assert time.monotonic() < deadline
    assert health.json()["status"] == "draining"
    refused = _ask(port)
    assert refused.status_code == 503 and refused.headers["retry-after"]
    refused.close()
    assert running.process.poll() is None
    engine.release.set()
    assert b"".join(pieces) == b"data: [DONE]\n\n"
    response.close()
    assert running.process.wait(DEADLINE) == 0


def test_second_signal_forces(running: Running, engine: Engine) -> None:
    port, response, pieces = _in_flight(running, engine)
    running.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + DEADLINE
    while requests.get(f"http://127.0.0.1:{port}/health", timeout=DEADLINE).status_code == 200:
        assert time.monotonic() < deadline
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(DEADLINE) == 1
    with pytest.raises(requests.RequestException):
        list(pieces)
    response.close()


def test_key_is_in_neither_argv_nor_log(running: Running, engine: Engine) -> None:
    _, response, _ = _in_flight(running, engine)
    response.close()
    argv = Path(f"/proc/{running.process.pid}/cmdline").read_bytes()
    assert KEY.encode() not in argv
    assert KEY not in running.log.read_text()


def test_garbage_on_the_control_line_is_survived(running: Running, engine: Engine) -> None:
    running.hear("listening")
    running.control.sendall(b'nonsense\n{"type": "workers"}\n{"type": "new", "x": 1}\n')
    running.table(engine)
    running.hear("stats", workers={"aggregated-0": {"in_flight": 0}})
    assert running.log.read_text().count("is not understood") == 3


def test_first_free_port_of_a_range_is_kept(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        low = taken.getsockname()[1]
        router = Running(tmp_path, port=[low, min(low + 50, 65535)])
        try:
            assert low < router.hear("listening")["port"] <= low + 50
        finally:
            router.stop()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"polcy": "x"}, "polcy"),
        ({"policy": "x"}, "policy"),
        ({"port": [9, 1]}, "port is [9, 1]"),
        ({"port": [1]}, "port is [1]"),
        ({"port": 65536}, "port is 65536"),
        ({"retries": -1}, "retries"),
        ({"api_key_file": "/nonexistent"}, "/nonexistent"),
        ({"port": "TAKEN"}, "taken"),
    ],
)
def test_bad_start_is_an_error_with_a_hint_and_no_traceback(tmp_path: Path, change: Any, words: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        if change.get("port") == "TAKEN":
            change = {"port": taken.getsockname()[1]}
        router = Running(tmp_path, **change)
        try:
            assert router.process.wait(DEADLINE) in (3, 7)
            text = router.log.read_text()
            assert text.startswith("error: ") and words in text and "Traceback" not in text
        finally:
            router.stop()


def test_two_routers_with_one_range_take_two_ports(tmp_path: Path) -> None:
    """Binding is the only test of a port: nothing is probed first."""
    ports = set()
    low = 20000 + os.getpid() % 20000
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    routers = [Running(tmp_path / name, port=[low, low + 200]) for name in ("a", "b")]
    try:
        ports = {router.hear("listening")["port"] for router in routers}
        assert len(ports) == 2
    finally:
        for router in routers:
            router.stop()
