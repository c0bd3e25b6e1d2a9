"""What SGLang's log lines say: progress while it loads, the cause when it died."""

# Log lines are quoted whole.
# ruff: noqa: E501
from __future__ import annotations

import pytest

from hpcserve import engines

SGLANG = engines.get("sglang")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[2026-11-21 01:23:48 TP0] Load weight begin. avail mem=78.42 GB", "loading weights"),
        ("Loading safetensors checkpoint shards:  50% Completed | 2/4 [00:01<00:01,  1.50it/s]", "weights 2/4"),
        ("[2026-11-21 01:23:59 TP0] Load weight end. elapsed=11.20 s, type=LlamaForCausalLM, avail mem=62.00 GB, mem usage=15.10 GB.",
         "weights loaded in 11.20 s"),
        ("[2026-11-21 01:24:09 TP0] max_total_num_tokens=449512, chunked_prefill_size=8192, max_prefill_tokens=16384",
         "KV cache of 449512 tokens"),
        ("Capturing batches (bs=64 avail_mem=7.11 GB):  10%|#  | 2/20 [00:00<00:05]\r"
         "Capturing batches (bs=32 avail_mem=7.01 GB):  50%|#####  | 10/20 [00:02<00:02]", "CUDA graphs 10/20"),
        ("[2026-11-21 01:24:20] Start of pd disaggregation warmup ...", "warming up"),
        ("[2026-11-21 01:24:22] The server is fired up and ready to roll!", "answering"),
        ("[2026-11-21 01:24:22] INFO:     10.0.0.1:5 - \"POST /v1/completions HTTP/1.1\" 200 OK", None),
        ("", None),
    ],
)  # fmt: skip
def test_progress(line: str, says: str | None) -> None:
    assert SGLANG.progress(line) == says


@pytest.mark.parametrize(
    ("tail", "cause", "retry", "hint"),
    [
        ("launch_server.py: error: unrecognized arguments: --tensor 4", "bad-flag", False, "engine_args"),
        ("ValueError: dist_init_port at 20001 is not available in 30 seconds. port_name is used", "port-taken", True, "another"),
        ("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. Current value: mem_fraction_static=0.5",
         "out-of-memory", False, "mem-fraction-static"),
        ("Exception: Capture cuda graph failed: CUDA out of memory. Tried to allocate 20.00 MiB", "out-of-memory", False, "mem-fraction-static"),
        ("ImportError: Please install NIXL by following the instructions at https://github.com/ai-dynamo/nixl", "nixl", False, "KV transfer"),
        ("OSError: /m is not a local folder and is not a valid model identifier listed on 'hub'", "model-missing", False, "every node"),
    ],
)  # fmt: skip
def test_causes_of_death(tail: str, cause: str, retry: bool, hint: str) -> None:
    failure = SGLANG.diagnose(f"[2026-11-21 01:24:22 TP0] Scheduler hit an exception\n{tail}\n", 1)
    assert (failure.cause, failure.retry) == (cause, retry)
    assert hint in failure.hint
