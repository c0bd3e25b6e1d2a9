"""SGLang's KV transfer by NIXL out of host memory, for `device: cpu` (SGLang 0.5.23, NIXL 1.5.1).

SGLang tells NIXL that KV caches lie in a GPU's memory, wherever it computes (disaggregation/nixl/conn.py,
_normalize_kv_mem_kinds). It also knows the kind `DRAM`, for caches that it keeps on the host beside a GPU,
and tells it to the other side: that one word is all there is to change.

NIXL's progress thread spins: its Python API sets the time between two looks to 0 (nixl_agent.__init__).
Beside a GPU that takes a spare core; on the CPU it takes one that computes, for each engine, and also while
there is nothing to do. Here the thread sleeps meanwhile.

A general plugin of SGLang's (plugins/__init__.py), because it must be in each of the processes that SGLang
spawns. They all find it by its entry point, also where hpcserve did not start them: it does nothing unless
`VARIABLE` is set, which only the adapter does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

VARIABLE = "HPCSERVE_SGLANG_HOST_KV"
NORMALIZE = "sglang.srt.disaggregation.nixl.conn._normalize_kv_mem_kinds"
LOOK_EVERY_US = 10_000
"""At the latest: what comes in by TCP wakes the thread."""


def check() -> None:
    """Raises RuntimeError where SGLang was asked for host memory and won't find this plugin."""
    found = [entry.module for entry in entry_points(group="sglang.srt.plugins")]
    if os.environ.get(VARIABLE) == "1" and __name__ not in found:
        raise RuntimeError(
            "SGLang's KV caches on a CPU need a plugin of hpcserve's, which is not registered in this"
            " environment: install hpcserve again (pip install)"
        )


def install() -> None:
    """What SGLang calls."""
    if os.environ.get(VARIABLE) != "1":
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(NORMALIZE, on_host, HookType.AROUND)
    from nixl import _api

    _api.nixlBind.nixlAgentConfig = calm(_api.nixlBind.nixlAgentConfig)


def on_host(
    normalize: Callable[[list[str], int], list[str]], _kinds: list[str] | None, expected_len: int
) -> list[str]:
    """All buffers are the host's, whatever SGLang takes them for."""
    return normalize(["DRAM"] * expected_len, expected_len)


def calm(config: Any) -> Any:
    """NIXL's class of an agent's configuration, whose progress thread sleeps between two looks."""
    delay = config.pthrDelay

    class Calm(config):  # type: ignore[misc]
        @property
        def pthrDelay(self) -> int:
            """Microseconds."""
            return int(delay.__get__(self))

        @pthrDelay.setter
        def pthrDelay(self, _given: int) -> None:
            delay.__set__(self, LOOK_EVERY_US)

    return Calm
