from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .running import FakeEngine

Start = Callable[..., FakeEngine]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts engines, and stops them after the test."""
    engines: list[FakeEngine] = []
    numbers = itertools.count()

    def start_one(*flags: str, key: str | None = None, model: str = "toy") -> FakeEngine:
        engine = FakeEngine(tmp_path / f"engine-{next(numbers)}.log", *flags, key=key, model=model)
        engines.append(engine)
        return engine

    yield start_one
    for engine in engines:
        engine.stop()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeEngine]:
    """One aggregated engine for all tests of a module; they leave it as they found it."""
    running = FakeEngine(tmp_path_factory.mktemp("engine") / "log")
    yield running
    running.stop()


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Ports that nothing listens on. The kernel hands out other ones for a while."""

    def port() -> int:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            return int(sock.getsockname()[1])

    return port
