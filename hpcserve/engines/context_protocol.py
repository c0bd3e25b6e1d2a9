"""The request protocol of TensorRT-LLM's disaggregation (1.2.1): the context first, then the generation.

Leg 1 goes to a prefill replica as `context_only`; its answer has `disaggregated_params`: the first token, the
number of the request there, and a state that says where its KV blocks are. Leg 2 is the client's request
with these, unread but for `request_type`, which is now `generation_only`. The decode replica pulls the
blocks, takes the first token for its own, and writes it to the client with the others. Where the first token
ended the answer (a stop token), no blocks are kept, and the prefill replica's answer is the client's.

Read in TensorRT-LLM's commit 376f7e1 (v1.2.1), as the documentation of that version publishes it:
disaggregated_params.py and executor/result.py. The server's own files are not published there, and were read
as they were shortly before and after: serve/openai_protocol.py, serve/openai_server.py,
serve/openai_disagg_service.py (TensorRT-LLM's own router), _torch/pyexecutor/py_executor.py. 1.2.1 knows no
`disagg_request_id`, which 1.3 has, and its protocol refuses members that it does not know.
"""

from __future__ import annotations

from typing import Any

import msgspec

from . import causes
from .base import Engine, Failure, Json

_PARAMS = "disaggregated_params"
# An answer that goes on at the decode replica: it has ended neither (executor/result.py), or only by its
# length, which is the decode replica's to say.
_UNFINISHED = frozenset({"not_finished", "length"})
# Refused without `stream` (openai_protocol.py, validate_stream_options). All others stay, the answer's length
# among them: the first token is sampled here for both, and a wrong request is refused by both in one way.
_NOT_FOR_PREFILL = frozenset({"stream_options"})
_TRANSFER_FAILED = b"kv cache transfer"

_encode = msgspec.json.Encoder().encode


def prefill_request(body: Json) -> Json:
    """The client's request as `context_only`. Raises ValueError where only one replica can answer it."""
    if _value(body, "logprobs"):
        # `disaggregated_params` has no place for the first token's.
        raise ValueError("the probabilities of the first token stay on the prefill replica")
    leg = {key: value for key, value in body.items() if key not in _NOT_FOR_PREFILL}
    return {**leg, "stream": False, _PARAMS: {"request_type": "context_only"}}


def decode_request(body: Json, prefill_response: Json) -> Json:
    """The client's request as `generation_only`. KeyError: leg 1 kept no blocks."""
    choice = _only_choice(prefill_response)
    params = choice.get(_PARAMS)
    if not isinstance(params, dict) or choice.get("finish_reason") not in _UNFINISHED:
        raise KeyError(_PARAMS)
    leg = {**body, _PARAMS: {**params, "request_type": "generation_only"}}
    ids = prefill_response.get("prompt_token_ids")
    if ids:
        # As TensorRT-LLM's own router does: the prompt is tokenized once, and both have the same tokens.
        leg["prompt_token_ids" if "messages" in body else "prompt"] = ids
    return leg


def early_answer(prefill_response: Json, *, stream: bool) -> bytes | None:
    """The client's answer where leg 1 ended it, as JSON, or as a stream of events with its usage."""
    choice = _only_choice(prefill_response)
    if choice.get("finish_reason") in (None, *_UNFINISHED):
        return None
    choice = {**choice, _PARAMS: None}
    answer = {**prefill_response, "choices": [choice], "prompt_token_ids": None}
    if not stream:
        return _encode(answer)
    head = {name: answer.get(name) for name in ("id", "object", "created", "model")}
    if "message" in choice:
        head["object"] = "chat.completion.chunk"
        said = {name: value for name, value in choice["message"].items() if value not in (None, [])}
        parts: list[Json] = [{"delta": said, "finish_reason": None}, {"delta": {}}]
    else:
        parts = [{"text": choice.get("text")}]
    parts[-1] |= {name: choice.get(name) for name in ("finish_reason", "stop_reason")}
    chunks: list[Json] = [{**head, "choices": [{"index": 0, **part}]} for part in parts]
    chunks.append({**head, "choices": [], "usage": answer.get("usage")})
    return b"".join(b"data: " + _encode(chunk) + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"


def _only_choice(response: Json) -> Json:
    """KeyError where there is none."""
    choices = response.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise KeyError("choices")
    choice: Json = choices[0]
    return choice


def _value(body: Json, name: str) -> Any:
    found = body.get(name)
    return msgspec.json.decode(found) if isinstance(found, msgspec.Raw) else found


class ContextEngine(Engine):
    """What TensorRT-LLM and an engine that speaks like it have in common."""

    # It says where a decode replica connects to.
    router_members = (_PARAMS,)
    recomputes = False

    def diagnose(self, log_tail: str, exit_status: int | None) -> Failure:
        return causes.diagnose(log_tail, exit_status)

    def prefill_request(self, body: Json) -> Json:
        return prefill_request(body)

    def decode_request(self, body: Json, prefill_response: Json) -> Json:
        return decode_request(body, prefill_response)

    def early_answer(self, prefill_response: Json, *, stream: bool) -> bytes | None:
        return early_answer(prefill_response, stream=stream)

    def transfer_failed(self, status: int, body: bytes) -> bool:
        """Whatever goes wrong is a 400 (openai_server.py, create_error_response); its words tell
        (py_executor.py, _check_cache_transfer_errors)."""
        return status == 400 and _TRANSFER_FAILED in body

    def kv_bytes_received(self, metrics: str, rank: int | None = None) -> float | None:
        """None: /metrics has no bytes. That a `generation_only` request is answered shows that they came:
        a decode replica computes no prompt for it."""
        return None
