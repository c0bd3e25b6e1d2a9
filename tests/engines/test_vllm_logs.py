"""What vLLM's log lines say: progress while it loads, the cause when it died."""

# Log lines are quoted whole.
# ruff: noqa: E501
from __future__ import annotations

import pytest

from hpcserve import engines

VLLM = engines.get("vllm")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "(Worker pid=12044) INFO 11-21 01:23:48 [cpu_model_runner.py:68] Starting to load model /models/tiny...",
            "loading weights",
        ),
        ("Loading safetensors checkpoint shards:  50% Completed | 2/4 [00:01<00:01,  1.50it/s]", "weights 2/4"),
        ("(Worker pid=1) INFO 11-21 01:23:48 [default_loader.py:501] Loading weights took 0.04 seconds",
         "weights loaded in 0.04 s"),
        ("(EngineCore pid=1) INFO 11-21 01:23:49 [monitor.py:40] Starting torch.compile", "compiling"),
        ("INFO 11-21 01:23:49 [monitor.py:60] torch.compile took 12.50 s in total", "compiled in 12.50 s"),
        (
            "(EngineCore pid=1) INFO 11-21 01:23:49 [kv_cache_utils.py:2327] CPU KV cache size: 262,144 tokens, "
            "Maximum concurrency for 2,048 tokens per request: 128.00x",
            "KV cache of 262,144 tokens",
        ),
        ("(Worker pid=1) INFO 11-21 01:23:49 [base_worker.py:515] Initializing NIXL wrapper", "starting NIXL"),
        ("Capturing CUDA graphs (decode, FULL):   0%|  | 0/35 [00:00<?]\r"
         "Capturing CUDA graphs (decode, FULL):  40%|████      | 14/35 [00:02<00:03]", "CUDA graphs 14/35"),
        ("INFO [gpu_model_runner.py:6582] Graph capturing finished in 7 secs, took 0.60 GiB", "CUDA graphs captured"),
        (
            "(EngineCore pid=1) INFO 11-21 01:24:11 [core.py:402] init engine (profile, create kv cache, "
            "warmup model) took 22.95 s",
            "engine initialised in 22.95 s",
        ),
        ("INFO:     Application startup complete.", "answering"),
        ("(APIServer pid=1) INFO 11-21 01:23:31 [model.py:2152] Using max model len 2048", None),
        ("", None),
    ],
)  # fmt: skip
def test_progress(line: str, says: str | None) -> None:
    assert VLLM.progress(line) == says


DEATHS = {
    "port": (
        "(APIServer pid=7) INFO 11-21 01:00:00 [api_utils.py:286] non-default args: {}\n"
        "Traceback (most recent call last):\n"
        '  File "/x/launcher.py", line 348, in create_server_socket\n'
        "    sock.bind(addr)\n"
        "OSError: [Errno 98] Address already in use\n",
        1, "port-taken", "OSError: [Errno 98] Address already in use", True,
    ),
    "zmq port": (
        "(EngineCore pid=7) ERROR 11-21 01:00:00 [core.py:1] zmq.error.ZMQError: Address already in use (addr='tcp://*:2')\n"
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}\n",
        1, "port-taken", "zmq.error.ZMQError: Address already in use (addr='tcp://*:2')", True,
    ),
    "CUDA memory": (
        "(Worker pid=7) ERROR 11-21 01:00:00 [x.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate "
        "2.00 GiB. GPU 0 has a total capacity of 79.10 GiB\n",
        1, "out-of-memory",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB",
        False,
    ),
    "KV cache": (
        "ValueError: To serve at least one request with the model's max seq len (131072), (16.0 GiB KV cache is needed, "
        "which is larger than the available KV cache memory (9.5 GiB). Based on the available memory, the estimated\n",
        1, "out-of-memory", None, False,
    ),
    "no room": ("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`\n",
                1, "out-of-memory", None, False),
    "somebody else on the GPU": (
        "ValueError: Free memory on device cuda:0 (3.2/79.1 GiB) on startup is less than desired GPU memory utilization\n",
        1, "out-of-memory", None, False,
    ),
    "host memory": ("RuntimeError: [enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: "
                    "you tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)\n",
                    1, "out-of-memory", None, False),
    "not a repo": (
        "OSError: meta/none is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'\n"
        "If this is a private repository, make sure to pass a token\n",
        1, "model-missing", None, False,
    ),
    "no such path": (
        "(APIServer pid=1) huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or "
        "'namespace/repo_name': '/models/none'. Use `repo_type` argument if needed.\n",
        1, "model-missing", None, False,
    ),
    "offline": (
        "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder\n"
        "OSError: We couldn't connect to 'https://huggingface.co' to load the files\n",
        1, "model-missing", None, False,
    ),
    "unknown flag": (
        "usage: api_server.py [-h] [--headless]\napi_server.py: error: unrecognized arguments: --max-num-seq 3\n",
        2, "bad-flag", "api_server.py: error: unrecognized arguments: --max-num-seq 3", False,
    ),
    "bad value": ("api_server.py: error: argument --dtype: invalid choice: 'int3' (choose from 'auto')\n",
                  2, "bad-flag", None, False),
    "another directory for KV blocks": (
        "(EngineCore pid=1) ERROR 11-21 01:00:00 [core.py:1] hpcserve.errors.StorageError: /scratch/me/kv on n1 is not the "
        "directory for KV blocks that the launch made: No such file or directory\n",
        1, "kv-directory",
        "hpcserve.errors.StorageError: /scratch/me/kv on n1 is not the directory for KV blocks that the launch made: "
        "No such file or directory",
        False,
    ),
    "disk": ("OSError: [Errno 28] No space left on device: '/tmp/job/inductor/x'\n", 1, "disk-full", None, False),
    "quota": ("OSError: [Errno 122] Disk quota exceeded\n", 1, "disk-full", None, False),
    "nixl absent": ("(Worker pid=1) ERROR 11-21 01:00:00 [base_worker.py:513] NIXL is not available\n",
                    1, "nixl", "NIXL is not available", False),
    "nixl hash": ("RuntimeError: NIXL compatibility hash mismatch. Local: a, Remote: b. Prefill and decode instances\n",
                  1, "nixl", None, False),
    "nixl backend": ("nixl_cu12._bindings.nixlBackendError: NIXL_ERR_BACKEND\n", 1, "nixl", None, False),
    "architecture": (
        "ValueError: The checkpoint you are trying to load has model type `foo` but Transformers does not recognize "
        "this architecture.\n",
        1, "bad-flag", None, False,
    ),
    "killed": ("(Worker pid=1) INFO 11-21 01:00:00 [x.py:1] fine\n", -9, "out-of-memory", "was killed (SIGKILL)", True),
    "shm taken": (
        "(EngineCore pid=7) ERROR 11-21 01:00:00 [core.py:1] RuntimeError: Insufficient space in /dev/shm for CPU KV "
        "offload shared region in /dev/shm: 819200 MiB required, 204800 MiB free. Increase /dev/shm (e.g. --shm-size "
        "or --ipc=host).\n",
        1, "out-of-memory", None, True,
    ),
    "shm": ("", -7, "out-of-memory", "died of SIGBUS", True),
    "crashed": ("Fatal Python error: Segmentation fault\n", -11, "unknown", "crashed (SIGSEGV)", True),
    "other": (
        "Traceback (most recent call last):\n"
        '  File "/x/y.py", line 1, in <module>\n'
        "    go()\n"
        "RuntimeError: the moon is full\n"
        "/usr/lib/python3.11/multiprocessing/resource_tracker.py:224: UserWarning: There appear to be 1 leaked objects\n",
        1, "unknown", "RuntimeError: the moon is full", True,
    ),
    "silent": ("", 3, "unknown", "it ended with status 3", True),
}  # fmt: skip


@pytest.mark.parametrize("name", DEATHS)
def test_diagnose(name: str) -> None:
    tail, status, cause, message, retry = DEATHS[name]
    failure = VLLM.diagnose(tail, status)
    assert failure.cause == cause
    assert failure.retry is retry
    assert failure.hint
    if message is not None:
        assert failure.message == message


def test_who_fills_the_memory_of_kv_tiers_is_to_be_looked_for() -> None:
    tail, status, *_ = DEATHS["shm taken"]
    assert "kv_offload.cpu_gib" in VLLM.diagnose(tail, status).hint


def test_a_healthy_log_has_no_known_cause() -> None:
    tail = (
        "(EngineCore pid=1) INFO 11-21 01:23:49 [nixl_utils.py:72] NIXL is available\n"
        "2026-11-21 01:23:49 NIXL INFO    _api.py:405 Backend UCX was instantiated\n"
        "(Worker pid=1) INFO 11-21 01:23:49 [cpu_worker.py:260] Explicitly set (1.0/10.59) GiB for KV cache on node 0.\n"
        "(APIServer pid=1) WARNING 11-21 01:23:31 [system_utils.py:255] Found ulimit of 20000 and failed\n"
        "(APIServer pid=1) INFO 11-21 01:24:12 [entry.py:136] Supported tasks: ['generate']\n"
    )
    assert VLLM.diagnose(tail, 1).cause == "unknown"
    assert VLLM.diagnose(tail, 1).message == "Supported tasks: ['generate']"
