"""The two-leg request protocol of vLLM's NIXL connector, pull mode (vLLM 0.32).

Leg 1 goes to a prefill replica with `do_remote_decode`; its answer has `kv_transfer_params`, which
says where the KV blocks are kept. Leg 2 is the client's request plus those params, unread: engines
add keys from version to version, and a dropped one silently disables heartbeats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import causes, resuming
from .base import Engine, Failure, Json, RoutedRank
from .kv_events import endpoints

if TYPE_CHECKING:
    from ..plan.plan import ReplicaPlan

_KEEP_BLOCKS: Json = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_BYTES = "vllm:nixl_bytes_transferred_sum"
_RANK = "x-data-parallel-rank"
"""Read by entrypoints/generate/base/serving.py; counts the ranks that the API's process manages, from 0
(v1/engine/input_processor.py)."""

# Keys the prefill leg must do without, or has no use for. Paths are vLLM 0.32's, below vllm/.
#
# All others stay. Not only the messages make the prompt, and both legs must see the same tokens:
# `tools`, `documents`, `reasoning_effort` and `chat_template*` are the template's; so are `tool_choice`
# and `response_format` (renderers/kimi_k3.py writes both into the prompt, and
# `--exclude-tools-when-tool-choice-none` drops the tools). A forced tool call or a JSON schema does not
# fail after one token: parser/abstract_parser.py takes any text for a named tool and ignores a broken
# one for `required`; but without its `tool_choice` a request with tools is one with `auto`, which an
# engine without a tool parser refuses (renderers/online_renderer.py). `stop`, `stop_token_ids` and
# `ignore_eos` can't end a request before its first token, and stopped requests keep their blocks as well
# (nixl/pull_scheduler.py: FINISHED_STOPPED, FINISHED_LENGTH_CAPPED). Sampling parameters change the one
# token nobody reads; wrong ones are refused by both legs in the same words.
_NOT_FOR_PREFILL = frozenset(
    {
        # Refused without `stream` (entrypoints/openai/*/protocol.py, validate_stream_options).
        "stream_options",
        # Refused above max_tokens, which is 1 (sampling_params.py, _verify_args).
        "min_tokens",
        # No key of 0.32; engines that have it refuse one above `n`.
        "best_of",
        # Not in any prompt, and the request would wait for a compiled grammar
        # (v1/request.py: WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR) before its prompt is computed.
        "structured_outputs",
        # Only fill the answer, up to a figure per word of the vocabulary. They go together: each of the
        # last two is refused without the first (chat_completion/protocol.py, check_logprobs).
        "logprobs",
        "top_logprobs",
        "logprob_token_ids",
        # Put the prompt into the answer.
        "echo",
        "return_token_ids",
    }
)


def prefill_request(body: Json) -> Json:
    """The client's request, cut down to computing its prompt: one token, one choice, no stream."""
    leg = {key: value for key, value in body.items() if key not in _NOT_FOR_PREFILL}
    leg |= {"stream": False, "max_tokens": 1, "n": 1, "kv_transfer_params": dict(_KEEP_BLOCKS)}
    if "max_completion_tokens" in leg:
        leg["max_completion_tokens"] = 1
    return leg


def decode_request(body: Json, prefill_response: Json) -> Json:
    """The client's request with the params of leg 1. KeyError: leg 1 kept no blocks."""
    params = prefill_response.get("kv_transfer_params")
    if not params:
        raise KeyError("kv_transfer_params")
    return {**body, "kv_transfer_params": params}


def bytes_received(metrics: str, rank: int | None = None) -> float | None:
    """Of one data-parallel rank, or the sum over the engine's; None when the metric is not there."""
    total, found = 0.0, False
    for line in metrics.splitlines():
        if line.startswith(_BYTES) and (rank is None or f'engine="{rank}"' in line):
            total += float(line.rpartition(" ")[2])
            found = True
    return total if found else None


class NixlEngine(Engine):
    """What vLLM and an engine that speaks like it have in common."""

    can_resume = True

    def resume_obstacle(self, body: Json, sent: str) -> str | None:
        return resuming.obstacle(body)

    def tokenize_request(self, body: Json) -> Json | None:
        return resuming.tokenize(body)

    def answer_budget(self, body: Json) -> int | None:
        return resuming.budget(body)

    def resume_request(self, body: Json, prompt: Any, *, generated: int, max_tokens: int) -> Json:
        return resuming.resume(body, prompt, generated=generated, max_tokens=max_tokens)

    def diagnose(self, log_tail: str, exit_status: int | None) -> Failure:
        return causes.diagnose(log_tail, exit_status)

    def prefill_request(self, body: Json) -> Json:
        return prefill_request(body)

    def decode_request(self, body: Json, prefill_response: Json) -> Json:
        return decode_request(body, prefill_response)

    def kv_bytes_received(self, metrics: str, rank: int | None = None) -> float | None:
        return bytes_received(metrics, rank)

    def routed_ranks(self, replica: ReplicaPlan) -> tuple[RoutedRank, ...]:
        """One API takes the requests for all ranks; or, with experts over many nodes, one on each node those
        for its own. Without experts, vLLM 0.32 fails at that where a node has a single rank
        (v1/engine/core_client.py: DPAsyncMPClient waits for a coordinator that was not started)."""
        ranks, nodes = replica.data_parallel, len(replica.nodes)
        if ranks == 1:
            return ()
        if not replica.expert_parallel:
            return tuple(RoutedRank(rank=rank, node=0, headers={_RANK: str(rank)}) for rank in range(ranks))
        return tuple(
            RoutedRank(rank=rank, node=node, headers={_RANK: str(place)})
            for node in range(nodes)
            for place, rank in enumerate(endpoints.ranks_on(node, nodes=nodes, ranks=ranks))
        )
