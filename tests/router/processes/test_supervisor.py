"""Several router processes on one port, and what happens when one of them dies."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from hpcserve.router.config import WorkerSpec
from hpcserve.router.supervisor import SLOTS, Slots, add_up

from ..test_process import DEADLINE, KEY, Engine, Running, engine

__all__ = ["engine"]
HEADERS = {"authorization": f"Bearer {KEY}"}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start_one(**settings: Any) -> Running:
        running = Running(tmp_path, **settings)
        started.append(running)
        return running

    yield start_one
    for running in started:
        running.stop()


def _until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {DEADLINE} s for {what}")


def _relays(running: Running) -> list[int]:
    pid = running.process.pid
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _stream(port: int) -> tuple[requests.Response, Iterator[bytes]]:
    response = requests.post(
        f"http://127.0.0.1:{port}/v1/completions",
        json={"model": "toy", "prompt": "x", "stream": True},
        headers=HEADERS,
        timeout=DEADLINE,
        stream=True,
    )
    pieces = response.iter_content(None)
    assert next(pieces).startswith(b"data: 1\n\n")
    return response, pieces


def _inodes(pid: int) -> set[str]:
    """Sockets a process has open."""
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(os.readlink(fd))
        except FileNotFoundError:
            continue
    return {name for name in found if name.startswith("socket:")}


def _serving(relays: list[int], port: int, client_port: int) -> int:
    """The relay whose connection to this client it is."""
    wanted = f"0100007F:{port:04X} 0100007F:{client_port:04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines():
        if wanted in line:
            inode = f"socket:[{line.split()[9]}]"
            return next(pid for pid in relays if inode in _inodes(pid))
    raise AssertionError("no such connection")


@pytest.mark.parametrize("deadly", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "it hangs"])
def test_a_lost_relay_is_replaced_and_streams_of_others_go_on(
    start: Callable[..., Running], engine: Engine, deadly: signal.Signals
) -> None:
    running = start(processes=2)
    port = running.hear("listening")["port"]
    running.table(engine)
    running.hear("stats", workers={"aggregated-0": {"in_flight": 0}})
    relays = _relays(running)
    assert len(relays) == 2
    streams: dict[int, tuple[requests.Response, Iterator[bytes]]] = {}
    # A dropped iterator would close its connection.
    others: list[tuple[requests.Response, Iterator[bytes]]] = []
    for _ in range(200):
        response, pieces = _stream(port)
        assert response.raw.connection is not None
        mine = _serving(relays, port, response.raw.connection.sock.getsockname()[1])
        if mine in streams:
            others.append((response, pieces))
        else:
            streams[mine] = response, pieces
        if len(streams) == 2:
            break
    total = len(others) + 2
    running.hear("stats", in_flight=total, workers={"aggregated-0": {"in_flight": total}})
    victim, survivor = relays
    os.kill(victim, deadly)
    with pytest.raises(requests.RequestException):
        # Its clients learn of it, so that they can try again.
        list(streams[victim][1])
    new = _until(lambda: len(now := _relays(running)) == 2 and victim not in now and now, "a new relay")
    assert survivor in new
    for _ in range(20):
        # Each connection lands somewhere: on the survivor, or on the new one, which may still be starting.
        assert requests.get(f"http://127.0.0.1:{port}/health", timeout=DEADLINE).status_code == 200
    engine.release.set()
    assert b"".join(streams[survivor][1]) == b"data: [DONE]\n\n"
    for response, _ in (*others, *streams.values()):
        response.close()
    stats = running.hear("stats", in_flight=0, workers={"aggregated-0": {"in_flight": 0}})
    assert stats["requests"] >= total - 1


def test_metrics_of_one_relay_are_those_of_all(start: Callable[..., Running], engine: Engine) -> None:
    engine.release.set()
    running = start(processes=3)
    port = running.hear("listening")["port"]
    running.table(engine)
    running.hear("stats", workers={"aggregated-0": {"in_flight": 0}})
    for _ in range(30):
        response, pieces = _stream(port)
        list(pieces)
        response.close()
    text = requests.get(f"http://127.0.0.1:{port}/metrics", headers=HEADERS, timeout=DEADLINE).text
    counts = re.findall(
        r'^hpcserve_router_requests_total\{.*completions.*status="200".*\} (\S+)$', text, re.M
    )
    assert [float(count) for count in counts] == [30.0]
    assert "hpcserve_router_time_to_first_token_seconds_count 30" in text


def test_all_relays_drain_and_end(start: Callable[..., Running], engine: Engine) -> None:
    running = start(processes=2)
    port = running.hear("listening")["port"]
    running.table(engine)
    running.hear("stats", workers={"aggregated-0": {"in_flight": 0}})
    response, pieces = _stream(port)
    running.process.send_signal(signal.SIGTERM)
    _until(
        lambda: requests.get(f"http://127.0.0.1:{port}/health", timeout=DEADLINE).status_code == 503,
        "draining",
    )
    engine.release.set()
    assert b"".join(pieces) == b"data: [DONE]\n\n"
    response.close()
    assert running.process.wait(DEADLINE) == 0
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{port}/health", timeout=DEADLINE)


def test_a_killed_supervisor_leaves_its_port_and_its_streams(
    start: Callable[..., Running], engine: Engine
) -> None:
    running = start(processes=2)
    port = running.hear("listening")["port"]
    running.table(engine)
    running.hear("stats", workers={"aggregated-0": {"in_flight": 0}})
    relays = _relays(running)
    response, pieces = _stream(port)
    running.process.kill()
    running.process.wait(DEADLINE)
    _until(lambda: _free(port), "the port to be free for the next router")
    engine.release.set()
    assert b"".join(pieces) == b"data: [DONE]\n\n"
    response.close()
    _until(lambda: not any(_alive(pid) for pid in relays), "the relays to end")


def _free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
            sock.listen()
        except OSError:
            return False
    return True


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_port_of_another_router_of_this_user_is_taken(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    running = start(processes=2)
    port = running.hear("listening")["port"]
    (tmp_path / "second").mkdir()
    second = Running(tmp_path / "second", port=port, processes=2)
    try:
        assert second.process.wait(DEADLINE) == 3
        assert f"port {port}" in second.log.read_text()
    finally:
        second.stop()


def test_tls_and_a_unix_socket(start: Callable[..., Running], tmp_path: Path) -> None:
    cert, key, unix = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "socket"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=IP:127.0.0.1",
        ],
        check=True, capture_output=True, timeout=DEADLINE,
    )  # fmt: skip
    running = start(processes=2, tls_cert=str(cert), tls_key=str(key), unix_socket=str(unix))
    port = running.hear("listening")["port"]
    answer = requests.get(f"https://127.0.0.1:{port}/health", verify=str(cert), timeout=DEADLINE)
    assert answer.json()["status"] == "starting"
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert not plain.recv(1000).startswith(b"HTTP/1.1 200")
    assert unix.stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as local:
        local.settimeout(DEADLINE)
        local.connect(str(unix))
        local.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert local.recv(1000).startswith(b"HTTP/1.1 503")
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(DEADLINE) == 0
    assert not unix.exists()


def test_a_bad_certificate_is_an_error_with_a_hint(start: Callable[..., Running], tmp_path: Path) -> None:
    (tmp_path / "cert").write_text("nonsense")
    running = start(tls_cert=str(tmp_path / "cert"))
    assert running.process.wait(DEADLINE) == 3
    assert running.log.read_text().startswith("error: TLS does not work")


def test_slots_stay_with_workers_and_are_used_again() -> None:
    def specs(*names: str) -> list[WorkerSpec]:
        return [WorkerSpec(name=name, role="aggregated", url="http://x:1") for name in names]

    slots = Slots()
    first = {spec.name: spec.slot for spec in slots.assign(specs("a", "b", "c"))}
    assert len(set(first.values())) == 3
    second = {spec.name: spec.slot for spec in slots.assign(specs("a", "c", "d"))}
    assert second["a"] == first["a"] and second["c"] == first["c"]
    assert len(set(second.values())) == 3
    for number in range(3 * SLOTS):
        assert slots.assign(specs("a", f"n{number}"))[1].slot is not None


def test_figures_add_up() -> None:
    first = {"a": 1, "w": {"x": {"n": 1}}}
    second = {"a": 2, "b": 3, "w": {"x": {"n": 2}, "y": {"n": 5}}}
    assert add_up([first, second]) == {"a": 3, "b": 3, "w": {"x": {"n": 3}, "y": {"n": 5}}}
