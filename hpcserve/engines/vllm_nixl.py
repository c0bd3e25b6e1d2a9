"""vLLM's NIXL connector for `device: cpu`, which leaves the cores to those that compute.

vLLM 0.32 pins the worker's main thread to the last core of every NUMA node when NIXL starts
(`nixl/base_worker.py`), wherever the engine was told to compute. With two engines on one machine both
main threads then spin on that core, which is also where the second engine computes, and a request
that takes half a second takes up to sixteen. hpcserve gives each engine cores of its own, so the
mask the engine was started with is put back.

NIXL 1.5.1 gives each agent a thread that asks for news without a pause, for as long as the engine lives:
Python can't say otherwise (`nixl_agent` sets `pthrDelay` to 0). Here that takes a core that engines compute
on. UCX wakes the thread when there is news, so it can wait.

Loaded by vLLM through `kv_connector_module_path`; nothing else imports it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nixl import _api
from vllm.distributed.kv_transfer.kv_connector.v1 import nixl

PAUSE = 1000
"""Microseconds, at most, between two looks for news."""


class NixlConnector(nixl.NixlConnector):
    """The name is vLLM's: it also compares connectors by name."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        cores = os.sched_getaffinity(0)
        with patient_agents():
            super().__init__(vllm_config, role, kv_cache_config)
        os.sched_setaffinity(0, cores)


@contextmanager
def patient_agents() -> Iterator[None]:
    """NIXL's agents that are made meanwhile look for news every PAUSE, or when UCX wakes them."""
    bindings: Any = _api.nixlBind
    make = bindings.nixlAgent

    def patient(name: str, config: Any) -> Any:
        config.pthrDelay = PAUSE
        return make(name, config)

    bindings.nixlAgent = patient
    try:
        yield
    finally:
        bindings.nixlAgent = make
