"""The request protocol of SGLang's disaggregation (0.5.23): both legs at once.

The same request goes to a prefill and to a decode replica, with the address of the prefill replica's
bootstrap server and a room, a number of that request alone. The decode replica finds the prefill replica
there, which writes the KV into its memory. What prefill answers says only that this went well, or why not.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from . import causes, sglang_resuming
from .base import Engine, Failure, Json

BOOTSTRAP_PORT = "bootstrap"
"""Name of the port, in `Engine.ports()`."""
_ROOMS = 1 << 63
_SENT_MB = "sglang:kv_transfer_total_mb_sum"

# Keys the prefill leg must do without. All others stay: it samples the answer's first token for both
# (disaggregation/utils.py, MetadataBuffers), and so needs what the client asked of it. The ids of a long
# prompt would only fill an answer that nobody reads.
_NOT_FOR_PREFILL = frozenset({"stream", "stream_options", "return_token_ids"})


def pair_requests(body: Json, *, url: str, ports: Mapping[str, int]) -> tuple[Json, Json]:
    """The bodies for prefill and decode; `url` and `ports` are the prefill replica's."""
    meeting: Json = {
        "bootstrap_host": urlsplit(url).hostname,
        # null: the decode replica takes the port that it was given itself, by default 8998.
        "bootstrap_port": ports.get(BOOTSTRAP_PORT),
        "bootstrap_room": secrets.randbelow(_ROOMS),
    }
    # Whole, so that its status tells how it went.
    prefill = {key: value for key, value in body.items() if key not in _NOT_FOR_PREFILL}
    return {**prefill, **meeting}, {**body, **meeting}


def obstacle(member: Callable[[str], Any]) -> str | None:
    """Probabilities of the prompt's tokens are known to prefill alone (openai/serving_completions.py)."""
    if member("echo") and member("logprobs"):
        return "`echo` with `logprobs`"
    return None


def bytes_sent(metrics: str) -> float | None:
    """Sum over the engine's ranks; 0 where nothing was sent, None where these are no metrics of SGLang."""
    total, known = 0.0, False
    for line in metrics.splitlines():
        known = known or line.startswith("sglang:")
        if line.startswith(_SENT_MB):
            total += float(line.rpartition(" ")[2])
    return total * (1 << 20) if known else None


class PairEngine(Engine):
    """What SGLang and an engine that speaks like it have in common."""

    paired = True
    # SGLang's decode replicas count no bytes (observability/req_time_stats.py).
    kv_counted_by = "prefill"
    # entrypoints/openai/protocol.py, PDRoutingFields. Ranks too: with a wrong one both wait for each other.
    router_members = (
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "routed_dp_rank",
        "data_parallel_rank",
        "disagg_prefill_dp_rank",
    )

    can_resume = True
    detokenized_member = "text"
    stop_member = "matched_stop"
    # Text up to the last space goes out while a character is incomplete (managers/detokenizer_manager.py).
    text_ends_with_token = False

    def names_tokens(self, *, chat: bool) -> bool:
        return not chat

    def resume_obstacle(self, body: Json, sent: str) -> str | None:
        return sglang_resuming.obstacle(body, sent)

    def tokenize_request(self, body: Json) -> Json | None:
        return sglang_resuming.tokenize(body)

    def answer_budget(self, body: Json) -> int | None:
        return sglang_resuming.budget(body)

    def resume_request(self, body: Json, prompt: Any, *, generated: int, max_tokens: int) -> Json:
        return sglang_resuming.resume(body, prompt, generated=generated, max_tokens=max_tokens)

    def diagnose(self, log_tail: str, exit_status: int | None) -> Failure:
        return causes.diagnose(log_tail, exit_status)

    def pair_requests(self, body: Json, *, url: str, ports: Mapping[str, int]) -> tuple[Json, Json]:
        return pair_requests(body, url=url, ports=ports)

    def pair_obstacle(self, member: Callable[[str], Any]) -> str | None:
        return obstacle(member)

    def kv_bytes_received(self, metrics: str, rank: int | None = None) -> float | None:
        return bytes_sent(metrics)
