"""vLLM's KV tiers in files, above all one that outlives the run and that all replicas and later jobs read.

vLLM 0.32 has a tier of files itself (`v1/kv_offload/tiering/fs`). For a directory that jobs share it lacks
what this one has: names that tell weights, versions and KV cache layouts apart (its FileMapper goes by the
model's path, and leaves the layout out); checksums; a limit; and times of use, so that what goes first is
what nobody asks for.

Loaded by vLLM through `module_path` of a secondary tier; nothing else imports it.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import vllm
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    get_offload_block_hash,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager
from vllm.v1.kv_offload.tiering.fs.thread_pool import DualQueueThreadPool

from .kv_files import Allowance, KvFiles, fingerprint, need_directory

logger = logging.getLogger(__name__)

READERS, WRITERS = 8, 4
"""Threads. A client of a parallel file system is quick only with several requests at once."""
MOST_WAITING = 0.25
"""Part of the memory tier that may wait to be written: a slow file system must not take all of it."""
YOUNG = 600.0
"""Seconds after which the time of a file that was used again is set again."""
_REMEMBERED = 100_000
"""Chunks whose last use is remembered."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


class SharedFiles(SecondaryTierManager):
    """One per data-parallel rank, in the process of its scheduler.

    It tells no KV events: what is in the directory is every replica's, and leaves it without anybody's event.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        directory: str,
        room: str,
        settings: str,
        revision: str | None = None,
        backpressure_detector: Any = None,
    ) -> None:
        """`settings`: digest of what model.yaml says about the numbers the model computes.

        Raises StorageError, OSError.
        """
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = Locality.REMOTE
        need_directory(directory)
        config = offloading_spec.config
        self._files = KvFiles(
            directory,
            re.sub(r"[^\w.-]+", "-", os.path.basename(os.path.normpath(config.model.name)))[:64],
            {"settings": settings, "weights": fingerprint(config.model.name, revision)}
            | _layout(offloading_spec),
            self.block_size_bytes,
        )
        self._allowance = Allowance(room)
        self._pool = DualQueueThreadPool(READERS, WRITERS, thread_name_prefix="hpcserve_kv")
        self._clock = ThreadPoolExecutor(1, thread_name_prefix="hpcserve_kv_times")
        self._found = _Lookup(tier_type, self._files)
        self._jobs: dict[int, _Job] = {}
        self._waiting = 0
        """Bytes of stores that were submitted and have not ended."""
        self._last_use: OrderedDict[OffloadKey, float] = OrderedDict()
        """When a chunk's file was last given a new time, for those that were used of late."""
        self._warned = _Warnings()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        if _comes_by_nixl(req_context):
            return LookupResult.MISS
        found = self._found.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        size = len(job_metadata.keys) * self.block_size_bytes
        if self._waiting + size > MOST_WAITING * self._primary_kv_view.nbytes:
            self._warned.of("slow", "the file system of `storage.kv` is slow: not all KV blocks get there")
            self._submit(job_metadata, None, self._pool.enqueue_store)
            return
        self._waiting += size
        self._submit(job_metadata, self._write, self._pool.enqueue_store, waiting=size)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata, self._read, self._pool.enqueue_load)

    def _submit(
        self,
        told: TransferJob,
        do: Callable[[str, memoryview], int | None] | None,
        enqueue: Callable[..., None],
        waiting: int = 0,
    ) -> None:
        job = self._jobs[told.job_id] = _Job(told, waiting)
        tasks = [functools.partial(_nothing)]
        if do is not None:
            rows = zip(job.keys, told.chunk_ids, strict=True)
            tasks = [functools.partial(self._run, job, do, key, int(row)) for key, row in rows]
        enqueue(told.job_id, len(tasks), tasks)

    def _run(self, job: _Job, do: Callable[[str, memoryview], int | None], key: OffloadKey, row: int) -> None:
        """In a thread of the pool. What can't be read is computed; what can't be written is not kept."""
        path = self._files.path(get_offload_block_hash(key), get_offload_group_idx(key))
        view = self._primary_kv_view.cast("B")
        chunk = view[row * self.block_size_bytes : (row + 1) * self.block_size_bytes]
        try:
            moved = do(path, chunk)
        except OSError as error:
            if error.errno in _FULL:
                self._allowance.stop()
                # Not in the system's words: an engine that dies later would be taken for one that died of it.
                self._warned.of(
                    "full", "no room or quota left in `storage.kv`: no KV blocks go there for a while"
                )
            elif not isinstance(error, FileNotFoundError):
                self._warned.of(str(error.errno), f"KV blocks in files: {error}")
            return
        if moved is not None:
            job.done(key, moved)

    def _write(self, path: str, chunk: memoryview) -> int | None:
        if self._files.has(path):
            return 0
        if not self._allowance.take(chunk.nbytes):
            if 0 < self._allowance.most < chunk.nbytes:
                text = f"`kv_offload.shared_gib` is too small: a file has {chunk.nbytes} bytes"
                self._warned.of("small", text)
            return None
        return self._files.write(path, chunk)

    def _read(self, path: str, chunk: memoryview) -> int:
        self._files.read(path, chunk)
        return chunk.nbytes

    def get_finished_jobs(self) -> Iterable[JobResult]:
        results = []
        for job_id, _, seconds in self._pool.get_finished():
            job = self._jobs.pop(job_id)
            self._waiting -= job.waiting
            good, moved = job.result()
            # Written or not, the memory is free again; a chunk that was not read is another matter.
            missing = [key for key in job.keys if key not in good] if job.loads else []
            if missing:
                self._found.mark_miss(missing)
            if job.loads:
                self._use(good)
            else:
                self._last_use |= dict.fromkeys(good, time.monotonic())
            results.append(
                JobResult(
                    job_id=job_id,
                    success=not missing,
                    successful_keys=tuple(good) if missing and good else None,
                    transfer_time=seconds,
                    transfer_bytes=moved,
                )
            )
        return results

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._found.cleanup(req_context.req_id)
        # A prompt that everybody shares never leaves the GPU, and so is never read here, and vLLM 0.32 never
        # calls `touch`. But the request knows its chunks.
        self._use(req_context._offload_key_positions)

    def _use(self, keys: Iterable[OffloadKey]) -> None:
        now = time.monotonic()
        paths = []
        for key in keys:
            if now - self._last_use.get(key, float("-inf")) < YOUNG:
                continue
            self._last_use[key] = now
            self._last_use.move_to_end(key)
            paths.append(self._files.path(get_offload_block_hash(key), get_offload_group_idx(key)))
        while len(self._last_use) > _REMEMBERED:
            self._last_use.popitem(last=False)
        if paths:
            self._clock.submit(self._set_times, paths)

    def _set_times(self, paths: list[str]) -> None:
        for path in paths:
            self._files.used(path)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._found.flush()

    def drain_jobs(self) -> None:
        self._pool.wait_idle()

    def shutdown(self) -> None:
        self._found.shutdown()
        self._clock.shutdown(wait=False, cancel_futures=True)
        self._pool.shutdown(wait=True)


class DiskFiles(FileSystemTierManager):
    """vLLM's own, on the node's disk."""

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        return LookupResult.MISS if _comes_by_nixl(req_context) else super().lookup(key, req_context)


def _comes_by_nixl(req_context: ReqContext) -> bool:
    """Does a prefill replica have the prompt of this request on a decode replica?

    vLLM's MultiConnector asks all connectors, and waits for what they look for, before it takes the offer of
    the first one. Where NIXL's transfer has failed, this is no longer so, and files may help.
    """
    return bool((req_context.kv_transfer_params or {}).get("do_remote_prefill"))


class _Job:
    """Chunks that are read or written, each by itself."""

    def __init__(self, told: TransferJob, waiting: int) -> None:
        self.keys = list(told.keys)
        self.loads = told.is_promotion
        self.waiting = waiting
        self._lock = threading.Lock()
        self._done: dict[OffloadKey, int] = {}

    def done(self, key: OffloadKey, moved: int) -> None:
        with self._lock:
            self._done[key] = moved

    def result(self) -> tuple[dict[OffloadKey, int], int]:
        """The chunks that are done, and the bytes that were moved. After the last one has ended."""
        return self._done, sum(self._done.values())


class _Lookup(AsyncLookupManager):
    """Which files are there, asked in a thread of its own."""

    def __init__(self, tier_type: str, files: KvFiles) -> None:
        self._files = files
        super().__init__(tier_type=tier_type)

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Iterable[bool]:
        places = [(get_offload_block_hash(key), get_offload_group_idx(key)) for key in keys]
        return [self._files.has(self._files.path(*place)) for place in places]


class _Warnings:
    """Each trouble once in a while: a full disk would fill the log as well."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: dict[str, float] = {}

    def of(self, kind: str, text: str) -> None:
        now = time.monotonic()
        with self._lock:
            if now - self._said.get(kind, float("-inf")) < YOUNG:
                return
            self._said[kind] = now
        logger.warning("%s", text)


def _nothing() -> None:
    """A job must have a task, or the pool never says that it has ended."""


def _layout(spec: Any) -> dict[str, Any]:
    """All that vLLM knows about the bytes of a chunk."""
    config, parallel = spec.config, spec.config.parallel
    groups = [[group.group_id, group.tokens_per_block, list(group.layer_names)] for group in config.groups]
    return {
        "vllm": vllm.__version__,
        # Which attention backend vLLM chooses, and so the order of a page's bytes, depends on the device.
        "device": current_platform.get_device_name(),
        "cache_dtype": config.model.dtype,
        "cache_layout": config.kv_cache_layout,
        "canonical": config.canonical_layout,
        "tokens_per_hash": config.cache.tokens_per_hash,
        "blocks_per_chunk": spec.blocks_per_chunk,
        "bytes_per_block": config.worker_kv_bytes_per_block,
        "tensor_parallel": parallel.tp_size,
        "pipeline_parallel": parallel.pp_size,
        "prefill_context_parallel": parallel.pcp_size,
        "decode_context_parallel": parallel.dcp_size,
        "one_copy": spec.replicated_layout,
        "groups": groups,
    }
