"""vLLM's KV offloading: tiers in files behind the one in memory, and tiers on `device: cpu`.

vLLM 0.32 offloads from GPUs only (`v1/kv_offload/cpu/spec.py`, get_worker). On a CPU the same bookkeeping
is kept, and copies are made inside the node's memory. Keeping blocks in memory twice saves nothing, but
what a run of a GPU cluster does with them is then the same here: which blocks are kept and found, their
metrics and events.

Loaded by vLLM through `spec_module_path`; nothing else imports it.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.kv_offload.base import GPULoadStoreSpec, OffloadingManager, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.gpu_worker import CPUOffloadingWorker
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class FileTiersSpec(TieringOffloadingSpec):
    """Memory, and files behind it, which have `tokens_per_file` tokens where that is set."""

    def __init__(self, config: Any) -> None:
        tokens = config.extra_config.get("tokens_per_file")
        if tokens:
            largest = max(group.tokens_per_block for group in config.groups)
            cache = replace(config.cache, blocks_per_chunk=max(1, tokens // largest))
            config = replace(config, cache=cache)
        super().__init__(config)

    def create_worker(self, kv_caches: Any) -> CPUOffloadingWorker:
        worker = super().create_worker(kv_caches)
        assert worker._mmap_region is not None
        worker._mmap_region._creator = False
        return worker

    def get_manager(self) -> OffloadingManager:
        """Of the scheduler, which is made when all workers have mapped the memory (v1/engine/core.py).

        Raises RuntimeError where it has got other memory than they.
        """
        manager = super().get_manager()
        region = self._scheduler_mmap
        if region is not None:
            if region._creator:
                # Files would get what is in this memory, and the GPU what is in the workers'.
                manager.shutdown()
                raise RuntimeError(
                    f"{region.mmap_path} is not there any more: another engine has the same engine_id"
                )
            # An engine that is killed would leave its file, and so all of this memory, to the node for ever.
            region._creator = False
            with suppress(FileNotFoundError):
                os.unlink(region.mmap_path)
        return manager


class HostOffloadingSpec(CPUOffloadingSpec):
    """Memory alone, on a CPU. Chunks are single blocks."""

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        chunks = [
            torch.zeros(self.num_chunks, cache.page_size_bytes, dtype=torch.int8)
            for cache in kv_caches.tensors
        ]
        return HostOffloadingWorker(kv_caches, chunks, blocks_per_chunk=1)


class HostFileTiersSpec(FileTiersSpec):
    """The same tiers on a CPU."""

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        region = SharedOffloadRegion(
            engine_id=self.config.engine_id,
            num_chunks=self.num_chunks,
            rank=0 if self.replicated_layout else self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        region._creator = False
        chunks = [
            region.create_next_worker_view(cache.page_size_bytes * self.blocks_per_chunk)
            for cache in kv_caches.tensors
        ]
        return HostOffloadingWorker(kv_caches, chunks, blocks_per_chunk=self.blocks_per_chunk)


class HostOffloadingWorker(OffloadingWorker):
    """Copies at once, so that a job is done when it is submitted."""

    def __init__(self, kv_caches: Any, chunks: list[Any], *, blocks_per_chunk: int) -> None:
        """`chunks`, by tensor: int8, a row for each chunk, which has its blocks one after the other."""
        self._blocks = [
            cache.tensor.view(torch.int8).view(-1, cache.page_size_bytes) for cache in kv_caches.tensors
        ]
        """Rows are blocks, by tensor."""
        self._per_chunk = blocks_per_chunk
        self._chunks = [
            kept.unflatten(1, (blocks_per_chunk, blocks.shape[1]))
            for kept, blocks in zip(chunks, self._blocks, strict=True)
        ]
        self._groups = [[ref.tensor_idx for ref in refs] for refs in kv_caches.group_data_refs]
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: Any) -> bool:
        return self._copy(job_id, src_spec, dst_spec, store=True)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: GPULoadStoreSpec) -> bool:
        return self._copy(job_id, dst_spec, src_spec, store=False)

    def _copy(self, job_id: int, ours: GPULoadStoreSpec, kept: Any, *, store: bool) -> bool:
        begun, size = time.perf_counter(), 0
        at = first_chunk = 0
        for count, first, tensors in zip(ours.group_sizes, ours.block_indices, self._groups, strict=True):
            rows = torch.from_numpy(ours.block_ids[at : at + count].astype("int64"))
            # The first block may lie in the middle of its chunk, and the last one as well.
            places = torch.arange(count) + first % self._per_chunk
            chunks = torch.from_numpy(kept.block_ids.astype("int64"))[first_chunk + places // self._per_chunk]
            there = (chunks, places % self._per_chunk)
            for tensor in tensors:
                if store:
                    self._chunks[tensor][there] = self._blocks[tensor][rows]
                else:
                    self._blocks[tensor][rows] = self._chunks[tensor][there]
                size += count * self._blocks[tensor].shape[1]
            at += count
            first_chunk += -(-(count + first % self._per_chunk) // self._per_chunk) if count else 0
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
