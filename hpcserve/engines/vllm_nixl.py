"""vLLM's NIXL connector for `device: cpu`, without its thread pinning.

vLLM 0.32 pins the worker's main thread to the last core of every NUMA node when NIXL starts
(`nixl/base_worker.py`), wherever the engine was told to compute. With two engines on one machine both
main threads then spin on that core, which is also where the second engine computes, and a request
that takes half a second takes up to sixteen. hpcserve gives each engine cores of its own, so the
mask the engine was started with is put back.

Loaded by vLLM through `kv_connector_module_path`; nothing else imports it.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import nixl


class NixlConnector(nixl.NixlConnector):
    """The name is vLLM's: it also compares connectors by name."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        cores = os.sched_getaffinity(0)
        super().__init__(vllm_config, role, kv_cache_config)
        os.sched_setaffinity(0, cores)
