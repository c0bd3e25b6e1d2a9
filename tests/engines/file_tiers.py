"""vLLM's own tiering manager over hpcserve's tiers, without an engine.

`python -m tests.engines.file_tiers DIRECTORY` prints what it found as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.kv_offload.base import (
    GPULoadStoreSpec,
    LookupResult,
    ReqContext,
    ScheduleEndContext,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)

from hpcserve.engines.kv_files import ROOM, allow, make_directory
from hpcserve.engines.vllm_offload import HostFileTiersSpec
from tests.patience import DEADLINE

BLOCK, BYTES, PER_FILE, CHUNKS = 32, 4096, 8, 3
KEYS = [make_offload_key(bytes([number]) * 32, 0) for number in range(CHUNKS)]
END = ScheduleEndContext(new_req_ids=(), preempted_req_ids=())
MODULE = "hpcserve.engines.vllm_file_tiers"


class Replica:
    """Scheduler's and worker's side of one engine with two layers."""

    def __init__(self, root: Path, name: str, *, taken: bool = False) -> None:
        """`taken`: another engine of this name has taken the memory's."""
        files = [
            {"type": "DiskFiles", "module_path": MODULE, "root_dir": str(root / name)},
            {
                "type": "SharedFiles", "module_path": MODULE, "directory": str(root / "kv"),
                "room": str(root / ROOM), "settings": "abc",
            },
        ]  # fmt: skip
        extra = {"cpu_bytes_to_use": 1 << 22, "tokens_per_file": BLOCK * PER_FILE, "secondary_tiers": files}
        group = OffloadingGroupConfig(tokens_per_block=BLOCK, layer_names=("0", "1"), group_id=0)
        config = OffloadingConfig(
            groups=(group,),
            worker_kv_bytes_per_block=2 * BYTES,
            enable_kv_cache_events=False,
            extra_config=extra,
            engine_id=f"{name}-{os.getpid()}",
            model=OffloadingModelConfig(name=str(root / "model"), dtype="float32"),
            cache=OffloadingCacheConfig(tokens_per_hash=BLOCK, blocks_per_chunk=1),
            parallel=OffloadingParallelConfig(
                rank=0, world_size=1, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, data_parallel_index=0,
                data_parallel_size=1, data_parallel_rank_local=None, is_parallelism_agnostic=True,
            ),
            kv_cache_layout="LBNHC",
        )  # fmt: skip
        self.layers = [torch.zeros(64, BYTES, dtype=torch.int8) for _ in range(2)]
        spec = HostFileTiersSpec(config)
        self.worker = spec.get_worker(
            SimpleNamespace(
                tensors=[SimpleNamespace(tensor=layer, page_size_bytes=BYTES) for layer in self.layers],
                group_data_refs=[[SimpleNamespace(tensor_idx=number) for number in range(2)]],
            )
        )
        memory = Path(f"/dev/shm/vllm_offload_{config.engine_id}.mmap")
        assert memory.exists()
        if taken:
            memory.unlink()
        self.manager = spec.get_manager()
        self.named = memory.exists()

    def request(self, name: str, **params: Any) -> ReqContext:
        made = ReqContext(req_id=name, kv_transfer_params=params or None)
        for number, key in enumerate(KEYS, 1):
            made.set_offload_key_position(key, number * BLOCK * PER_FILE)
        self.manager.on_new_request(made)
        return made

    def step_while(self, busy: Any) -> None:
        deadline = time.monotonic() + DEADLINE
        while busy():
            assert time.monotonic() < deadline
            self.manager.on_schedule_end(END)
            time.sleep(0.005)

    def find(self, keys: list[Any], request: ReqContext) -> list[LookupResult]:
        """What is found in the end."""
        found: list[LookupResult] = []

        def busy() -> bool:
            found[:] = [self.manager.lookup(key, request) for key in keys]
            return any(each in (LookupResult.RETRY, LookupResult.HIT_PENDING) for each in found)

        self.step_while(busy)
        return found

    def store(self, request: ReqContext, blocks: list[int]) -> None:
        room = self.manager.prepare_store(KEYS, request)
        assert room is not None
        ours = GPULoadStoreSpec(blocks, group_sizes=[len(blocks)], block_indices=[0])
        self.worker.submit_store(1, ours, room.store_spec)
        self.manager.complete_store(KEYS, request)
        self.manager.on_request_finished(request)
        self.step_while(self.manager.has_pending_work)

    def load(self, request: ReqContext, keys: list[Any], blocks: list[int], first: int) -> None:
        """`first`: the first block's place in the prompt."""
        room = self.manager.prepare_load(keys, request)
        ours = GPULoadStoreSpec(blocks, group_sizes=[len(blocks)], block_indices=[first])
        self.worker.submit_load(2, room, ours)
        self.manager.complete_load(keys, request)


def main(root: Path) -> dict[str, Any]:
    make_directory(str(root / "kv"))
    allow(root, 1, 1 << 24)
    (root / "model").mkdir()
    (root / "model/model.safetensors").touch()

    one = Replica(root, "one")
    for layer in one.layers:
        layer.random_(-128, 127)
    blocks = list(range(20, 20 + CHUNKS * PER_FILE))
    one.store(one.request("stores"), blocks)
    files = {name: len(list((root / name).rglob("*.bin"))) for name in ("kv", "one")}
    one.manager.shutdown()

    two = Replica(root, "two")
    request = two.request("loads")
    found = two.find(KEYS[1:], request)
    sources = [two.manager.get_load_source(key, request) for key in KEYS[1:]]
    # From the middle of the second file on.
    first = PER_FILE + PER_FILE // 2
    two.load(request, KEYS[1:], list(range(CHUNKS * PER_FILE - first)), first)
    same = [
        torch.equal(ours[: CHUNKS * PER_FILE - first], theirs[20 + first : 20 + CHUNKS * PER_FILE])
        for ours, theirs in zip(two.layers, one.layers, strict=True)
    ]
    two.manager.on_request_finished(request)

    by_nixl = two.find(KEYS[:1], two.request("decode", do_remote_prefill=True))
    (damaged,) = (path for path in (root / "kv").rglob("*.bin") if path.name.startswith("00"))
    with damaged.open("r+b") as file:
        file.write(b"not what was written")
    try:
        Replica(root, "three", taken=True)
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    return {
        "refused": refused.split(": ")[-1],
        "left": [path.name for path in Path("/dev/shm").glob(f"vllm_offload_*-{os.getpid()}.mmap")],
        "named": [one.named, two.named],
        "files": files,
        "found": [each.name for each in found],
        "sources": [each.value for each in sources],
        "same": same,
        "by NIXL": by_nixl[0].name,
        "damaged": two.find(KEYS[:1], two.request("reads damage"))[0].name,
        "removed": not damaged.exists(),
    }


if __name__ == "__main__":
    print("FOUND" + json.dumps(main(Path(sys.argv[1]))))
