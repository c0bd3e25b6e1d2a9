"""TensorRT-LLM's start with the job key. It is stood in for, by an app of FastAPI as it has one."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from hpcserve.engines import tensorrt_llm_server

ARGV = ["--served-model-name", "llama", "/models/x", "--tp_size", "4"]


class OpenAIServer:
    """As in tensorrt_llm.serve: made with keywords, with an app that has its routes already."""

    def __init__(self, *, generator: Any, model: str) -> None:
        self.model = model.rpartition("/")[2]
        self.app = FastAPI()
        self.app.add_api_route("/health", lambda: "well")
        self.app.add_api_route("/v1/models", lambda: {"data": [{"id": self.model}]})


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tensorrt_llm.commands.serve, which notes what it was called with."""
    module: Any = ModuleType("tensorrt_llm.commands.serve")
    module.OpenAIServer = OpenAIServer
    module.seen = SimpleNamespace(args=None, environ={})

    def main(*, args: list[str], prog_name: str) -> None:
        module.seen.args = args
        module.seen.environ = dict(os.environ)

    module.main = main
    for name in ("tensorrt_llm", "tensorrt_llm.commands"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("TRTLLM_API_KEY", "secret")
    found: ModuleType = module
    return found


def test_the_command_is_serve_and_the_server_is_guarded(commands: Any) -> None:
    tensorrt_llm_server.main(ARGV)
    assert commands.seen.args == ["serve", "/models/x", "--tp_size", "4"]
    server = commands.OpenAIServer(generator=None, model="/models/x")
    client = TestClient(server.app)
    for path in ("/health", "/v1/models", "/metrics"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
    key = {"authorization": "Bearer secret"}
    assert client.get("/health", headers=key).json() == "well"
    assert client.get("/v1/models", headers=key).json() == {"data": [{"id": "llama"}]}


def test_slurm_is_forgotten_and_the_rest_is_not(commands: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "SLURM_JOB_ID",
        "SLURM_JOB_NODELIST",
        "SLURM_TASKS_PER_NODE",
        "UCX_NET_DEVICES",
        "OMPI_MCA_pml",
    ):
        monkeypatch.setenv(name, "x")
    tensorrt_llm_server.main(ARGV)
    assert not [name for name in commands.seen.environ if name.startswith("SLURM_")]
    assert {"UCX_NET_DEVICES", "OMPI_MCA_pml"} <= set(commands.seen.environ)


def test_no_key_no_server(commands: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRTLLM_API_KEY")
    with pytest.raises(RuntimeError, match="TRTLLM_API_KEY is not set"):
        tensorrt_llm_server.main(ARGV)
    assert commands.seen.args is None


def test_a_server_that_can_not_be_guarded_is_not_started(commands: Any) -> None:
    del commands.OpenAIServer
    with pytest.raises(RuntimeError, match="has no OpenAIServer to guard"):
        tensorrt_llm_server.main(ARGV)
    assert commands.seen.args is None


def test_the_command_line_begins_with_the_name(commands: Any) -> None:
    with pytest.raises(RuntimeError, match="must begin with --served-model-name"):
        tensorrt_llm_server.main(["/models/x", "llama"])
    assert commands.seen.args is None
