"""vLLM's KV offloading for `device: cpu`: the same bookkeeping, and copies inside the node's memory.

vLLM 0.32 offloads from GPUs only (`v1/kv_offload/cpu/spec.py`, get_worker). Keeping blocks in memory twice
saves nothing, but what a run of a GPU cluster does with them is then the same here: which blocks are kept and
found, their metrics and events.

Loaded by vLLM through `spec_module_path`; nothing else imports it.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.v1.kv_offload.base import GPULoadStoreSpec, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class HostOffloadingSpec(CPUOffloadingSpec):
    """Chunks are single blocks here."""

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        return HostOffloadingWorker(kv_caches, self.num_chunks)


class HostOffloadingWorker(OffloadingWorker):
    """Copies at once, so that a job is done when it is submitted."""

    def __init__(self, kv_caches: Any, chunks: int) -> None:
        self._blocks = [
            cache.tensor.view(torch.int8).view(-1, cache.page_size_bytes) for cache in kv_caches.tensors
        ]
        """Rows are blocks, by tensor."""
        self._chunks = [torch.zeros(chunks, blocks.shape[1], dtype=torch.int8) for blocks in self._blocks]
        self._groups = [[ref.tensor_idx for ref in refs] for refs in kv_caches.group_data_refs]
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: Any) -> bool:
        pairs = self._pairs(src_spec, dst_spec)
        return self._copy(job_id, self._blocks, self._chunks, [(ours, kept, t) for ours, kept, t in pairs])

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: GPULoadStoreSpec) -> bool:
        pairs = self._pairs(dst_spec, src_spec)
        return self._copy(job_id, self._chunks, self._blocks, [(kept, ours, t) for ours, kept, t in pairs])

    def _pairs(self, ours: GPULoadStoreSpec, kept: Any) -> list[tuple[Any, Any, int]]:
        """Rows of the cache, rows of what is kept, and the tensor they are in."""
        found, at = [], 0
        for size, tensors in zip(ours.group_sizes, self._groups, strict=True):
            rows = torch.from_numpy(ours.block_ids[at : at + size].astype("int64"))
            others = torch.from_numpy(kept.block_ids[at : at + size].astype("int64"))
            found += [(rows, others, tensor) for tensor in tensors]
            at += size
        return found

    def _copy(
        self, job_id: int, source: list[Any], target: list[Any], rows: list[tuple[Any, Any, int]]
    ) -> bool:
        begun, size = time.perf_counter(), 0
        for here, there, tensor in rows:
            target[tensor][there] = source[tensor][here]
            size += len(here) * source[tensor].shape[1]
        self._done.append(
            TransferResult(
                job_id=job_id, success=True, transfer_size=size, transfer_time=time.perf_counter() - begun
            )
        )
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Nothing runs."""
