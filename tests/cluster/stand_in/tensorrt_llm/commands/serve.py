"""`trtllm-serve serve`: the flags and the file that hpcserve gives, and a fake engine behind them."""

from __future__ import annotations

import argparse
import json
import os
import socket
import threading
import time
from typing import Any

import yaml

from hpcserve.engines.fake_server.server import main as serve
from tensorrt_llm.llmapi.worker import PLACE

_NEVER_HERE = ("SLURM_", "PMIX_", "OMPI_COMM_")


class OpenAIServer:
    """What hpcserve's guard is put before. The fake engine asks for the key itself."""

    def __init__(self) -> None:
        self.model = ""
        self.app = self

    def add_middleware(self, guard: type[Any]) -> None:
        """Raises RuntimeError without a key."""
        guard(self)


def main(*, args: list[str], prog_name: str) -> None:
    given = _parse(args[1:], prog_name)
    leaked = [name for name in os.environ if name.startswith(_NEVER_HERE)]
    assert not leaked, f"the server must not see {leaked}"
    with open(given.config) as file:
        worker = yaml.safe_load(file)
    transfer = worker.get("cache_transceiver_config")
    assert transfer is None or transfer["backend"] == "NIXL"
    workers, ranks = _workers()
    size = given.tp_size * given.pp_size
    assert len(ranks) == size, f"{size} ranks are asked for, and MPI has {len(ranks)}"
    assert [rank["node"] for rank in ranks] == sorted(rank["node"] for rank in ranks)
    os.environ["FAKE_ENGINE_API_KEY"] = os.environ["TRTLLM_API_KEY"]
    pair = "prefill" if worker.get("disable_overlap_scheduler") else "decode"
    role = "aggregated" if transfer is None else pair
    flags = ["--model", given.model, "--served-model-name", OpenAIServer().model, "--role", role]
    flags += ["--host", given.host, "--port", str(given.port), "--side-channel-port", str(_port(given.host))]
    with workers:
        serve([*flags, "--dialect", "tensorrt-llm", "--shutdown-timeout", "5"])
        # The worst that SIGTERM leaves: its workers are gone, and it waits for them to end.
        threading.Event().wait()


def _parse(args: list[str], prog_name: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog_name, allow_abbrev=False)
    parser.add_argument("model")
    for name in ("host", "backend", "config"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("port", "tp_size", "gpus_per_node"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--pp_size", type=int, default=1)
    return parser.parse_args(args)


def _workers() -> tuple[socket.socket, list[dict[str, Any]]]:
    """The connection to rank 0, and what it says about all of them."""
    line = socket.socket(socket.AF_UNIX)
    while True:
        try:
            line.connect(os.environ[PLACE])
        except FileNotFoundError:
            time.sleep(0.05)
            continue
        with line.makefile() as told:
            return line, json.loads(told.readline())


def _port(host: str) -> int:
    """A port for this engine's own transfers; real workers choose theirs as well."""
    with socket.create_server((host, 0)) as found:
        port: int = found.getsockname()[1]
        return port
