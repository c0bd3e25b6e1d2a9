"""`hpcserve router`: the router alone, in front of engines that someone else started."""

from __future__ import annotations

import json
import signal
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

from hpcserve.cli.main import main
from tests.patience import DEADLINE


class _Engine(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer({"data": [{"id": "toy", "object": "model"}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._answer({"id": "x", "choices": [{"index": 0, "text": "hi", "finish_reason": "length"}]})

    def _answer(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def engine() -> Iterator[_Engine]:
    server = _Engine()
    yield server
    server.stop()


def _run(tmp_path: Path, *args: str) -> tuple[subprocess.Popen[bytes], Path]:
    log = tmp_path / "log"
    with log.open("wb") as err:
        argv = [sys.executable, "-m", "hpcserve", "router", *args]
        return subprocess.Popen(argv, stdout=err, stderr=err), log


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text().splitlines():
            if "listening on http://" in line:
                return int(line.rpartition("http://")[2].partition(" ")[0].rpartition(":")[2])
        time.sleep(0.02)
    raise AssertionError(log.read_text())


def _until_status(url: str, status: int) -> None:
    deadline = time.monotonic() + DEADLINE
    while requests.get(url, timeout=DEADLINE).status_code != status:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_serves_asks_for_the_key_and_drains_on_ctrl_c(tmp_path: Path, engine: _Engine) -> None:
    (tmp_path / "key").write_text("sk-1\n")
    process, log = _run(
        tmp_path, "--aggregated", engine.url, "--port", "0", "--key-file", str(tmp_path / "key")
    )
    try:
        url = f"http://127.0.0.1:{_port(process, log)}"
        _until_status(f"{url}/health", 200)
        body = {"model": "toy", "prompt": "x"}
        assert requests.post(f"{url}/v1/completions", json=body, timeout=DEADLINE).status_code == 401
        headers = {"authorization": "Bearer sk-1"}
        answer = requests.post(f"{url}/v1/completions", json=body, headers=headers, timeout=DEADLINE)
        assert answer.json()["choices"][0]["text"] == "hi"
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 0
    finally:
        process.kill()
        process.wait()


def test_a_worker_that_does_not_answer_leaves_rotation_and_comes_back(
    tmp_path: Path, engine: _Engine
) -> None:
    second = _Engine()
    gone = second.server_port
    process, log = _run(tmp_path, "--aggregated", second.url, "--port", "0", "--no-auth")
    try:
        url = f"http://127.0.0.1:{_port(process, log)}"
        _until_status(f"{url}/health", 200)
        second.stop()
        _until_status(f"{url}/health", 503)
        second = _Engine(gone)
        _until_status(f"{url}/health", 200)
    finally:
        process.kill()
        process.wait()
        second.stop()
    assert "out of rotation" in log.read_text()


@pytest.mark.parametrize(
    "args, words",
    [
        (["--port", "0", "--no-auth"], "--aggregated"),
        (["--prefill", "http://x:1", "--port", "0", "--no-auth"], "--decode"),
        (
            ["--aggregated", "http://x:1", "--prefill", "y:2", "--decode", "z:3", "--port", "0"],
            "--aggregated",
        ),
        (["--aggregated", "http://x:1", "--port", "0"], "no key"),
        (["--aggregated", "https://x:1", "--port", "0", "--no-auth"], "https://x:1"),
        (["--aggregated", "http://x:1/v1", "--port", "0", "--no-auth"], "http://x:1/v1"),
        (["--aggregated", "http://x:1", "--port", "70000", "--no-auth"], "70000"),
        (["--aggregated", "x:1", "--port", "0", "--no-auth", "--tls-key", "k"], "--tls-cert"),
        (
            [
                "--aggregated",
                "x:1",
                "--port",
                "0",
                "--no-auth",
                "--served-name",
                "m",
                "--kv-events",
                "http://y:1=ipc:///a",
            ],
            "http://y:1",
        ),
        (["--aggregated", "x:1", "--port", "0", "--no-auth", "--kv-events", "x:1=/a"], "URL=EVENTS"),
    ],
)
def test_bad_arguments_are_told(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["router", *args]) == 2
    told = capsys.readouterr().err
    assert words in told and "hint:" in told


def test_a_model_no_engine_names_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["router", "--aggregated", "http://127.0.0.1:9", "--port", "0", "--no-auth"]) == 3
    assert "--served-name" in capsys.readouterr().err
