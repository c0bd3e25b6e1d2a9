"""SGLang's start with the job key. What SGLang brings is stood in for; `test_sglang_parser.py` has the real
arguments."""

from __future__ import annotations

import os
import pickle
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hpcserve.engines import sglang_host_kv, sglang_server
from hpcserve.engines.sglang_server import OPEN_DOORS, JobKeyGuard, Secret


class Started:
    """What SGLang was started with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> None:
        self.argv: list[str] = []
        self.api_key: str | None = None
        self.middleware: list[Any] = []
        self.doors: list[str] = []
        self.killed: list[tuple[int, bool]] = []

        def prepare(argv: list[str]) -> SimpleNamespace:
            self.argv = argv
            return SimpleNamespace(api_key=None)

        def run(server_args: SimpleNamespace) -> None:
            self.api_key = server_args.api_key
            self.doors = [name for name in OPEN_DOORS if name in os.environ]
            if fails:
                raise ValueError("no GPU")

        def kill(pid: int, *, include_parent: bool) -> None:
            self.killed.append((pid, include_parent))

        parts: dict[str, dict[str, Any]] = {
            "sglang": {},
            "sglang.srt": {},
            "sglang.srt.entrypoints": {},
            "sglang.launch_server": {"run_server": run},
            "sglang.srt.entrypoints.http_server": {
                "app": SimpleNamespace(add_middleware=self.middleware.append)
            },
            "sglang.srt.plugins": {"load_plugins": lambda: None},
            "sglang.srt.server_args": {"prepare_server_args": prepare},
            "sglang.srt.utils": {"kill_process_tree": kill},
        }
        for name, members in parts.items():
            module = ModuleType(name)
            vars(module).update(members)
            monkeypatch.setitem(sys.modules, name, module)


def test_the_key_comes_from_the_environment_and_guards_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started(monkeypatch)
    monkeypatch.setenv("SGLANG_API_KEY", "secret")
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    monkeypatch.setenv("SGLANG_GRPC_PORT", "1")
    sglang_server.main(["--model-path", "/m"])
    assert started.argv == ["--model-path", "/m"]
    assert started.api_key == "secret"
    assert started.middleware == [JobKeyGuard]
    assert started.doors == []
    assert started.killed == [(os.getpid(), False)]


def test_a_start_that_fails_leaves_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started(monkeypatch, fails=True)
    monkeypatch.setenv("SGLANG_API_KEY", "secret")
    with pytest.raises(ValueError, match="no GPU"):
        sglang_server.main([])
    assert started.killed == [(os.getpid(), False)]


def test_no_key_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started(monkeypatch)
    monkeypatch.delenv("SGLANG_API_KEY", raising=False)
    with pytest.raises(RuntimeError, match="SGLANG_API_KEY is not set"):
        sglang_server.main(["--model-path", "/m"])
    assert started.argv == []


def test_a_secret_is_a_text_that_is_not_shown() -> None:
    """Also in the processes that SGLang starts, which get its arguments pickled."""
    secret = pickle.loads(pickle.dumps(Secret("the-key")))
    assert secret == "the-key" and f"Bearer {secret}" == "Bearer the-key"
    assert "the-key" not in repr(secret) + str({"api_key": secret}) + f"{secret!r}"


async def test_the_guard_asks_for_sglangs_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_API_KEY", "secret")
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent.append("passed")

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def receive() -> Any:
        raise AssertionError

    for headers in ([], [(b"authorization", b"Bearer secret")]):
        await JobKeyGuard(app)({"type": "http", "path": "/ready", "headers": headers}, receive, send)
    assert sent == ["http.response.start", "http.response.body", "passed"]


def test_host_memory_without_the_plugin_that_tells_of_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started(monkeypatch)
    monkeypatch.setenv("SGLANG_API_KEY", "k")
    monkeypatch.setattr(sglang_host_kv, "entry_points", lambda *, group: ())
    sglang_server.main([])
    monkeypatch.setenv(sglang_host_kv.VARIABLE, "1")
    with pytest.raises(RuntimeError, match="install hpcserve again"):
        sglang_server.main([])
    plugin = SimpleNamespace(module="hpcserve.engines.sglang_host_kv")
    monkeypatch.setattr(sglang_host_kv, "entry_points", lambda *, group: (plugin,))
    sglang_server.main(["--model-path", "/m"])
    assert started.argv == ["--model-path", "/m"]
