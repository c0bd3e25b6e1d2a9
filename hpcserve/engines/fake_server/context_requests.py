"""What TensorRT-LLM takes in a request (1.2): known members only, and halves of a request.

Names are those of serve/openai_protocol.py. The state that a context server gives away is sealed here: it
must come back as it was, with the first token and the number it was given with.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .flags import Flags
from .requests import RequestError

Json = dict[str, Any]

_COMMON = frozenset(
    {
        "model", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty", "seed",
        "stop", "stream", "stream_options", "temperature", "top_p", "user", "lora_request", "best_of", "echo",
        "use_beam_search", "top_k", "top_p_min", "min_p", "repetition_penalty", "length_penalty",
        "early_stopping", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens",
        "skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens",
        "add_special_tokens", "response_format", "disaggregated_params",
    }
)  # fmt: skip
COMPLETION = _COMMON | {"prompt", "suffix", "return_context_logits", "detokenize"}
CHAT = _COMMON | {
    "messages", "prompt_token_ids", "top_logprobs", "max_completion_tokens", "tools", "tool_choice",
    "reasoning_effort", "add_generation_prompt", "documents", "chat_template", "chat_template_kwargs",
    "cache_salt",
}  # fmt: skip
_PARAMS = frozenset(
    {"request_type", "first_gen_tokens", "ctx_request_id", "encoded_opaque_state", "draft_tokens"}
)
_SECRET = b"of no engine but this one"


def check(body: Mapping[str, Any], *, chat: bool) -> None:
    """Raises RequestError for a member that the protocol does not have."""
    params = body.get("disaggregated_params")
    for given, known in ((body, CHAT if chat else COMPLETION), (params or {}, _PARAMS)):
        unknown = sorted(set(given) - known)
        if unknown:
            raise RequestError(
                f"1 validation error: ('body', '{unknown[0]}'): Extra inputs are not permitted"
            )
    if chat and "max_tokens" in body and "max_completion_tokens" in body:
        raise RequestError("1 validation error: max_tokens and max_completion_tokens are one member")


def kv_params(body: Mapping[str, Any], flags: Flags) -> Json | None:
    """The half that is asked for, in the scheduler's words; None for a whole request. Raises RequestError."""
    params = body.get("disaggregated_params")
    if params is None:
        return None
    if not flags.disaggregated:
        raise RequestError("Disaggregated serving is not enabled, please check the configuration.")
    match params.get("request_type"):
        case "context_only":
            # Whatever is asked for, the first token is the last one here; a stop token ends all.
            return {"do_remote_decode": True, "keep_after": ("length",)}
        case "generation_only":
            return {**_opened(params), "do_remote_prefill": True, "first": params["first_gen_tokens"]}
        case kind:
            raise RequestError(
                f"Unknown request type: {kind}. Must be context_only, generation_only or"
                " context_and_generation"
            )


def sealed(kept: Mapping[str, Any] | None, first: Sequence[int], number: int) -> Json:
    """`disaggregated_params` of a context server's answer; `kept` are its KV blocks, if it kept any."""
    params: Json = {"request_type": "context_only", **dict.fromkeys(_PARAMS - {"request_type"})}
    if kept is not None:
        state = json.dumps({"kept": kept, "seal": _seal(kept, first, number)}).encode()
        params |= {
            "first_gen_tokens": list(first),
            "ctx_request_id": number,
            "encoded_opaque_state": base64.b64encode(state).decode(),
        }
    return params


def _opened(params: Mapping[str, Any]) -> Json:
    try:
        state = json.loads(base64.b64decode(params["encoded_opaque_state"], validate=True))
        kept: Json = state["kept"]
        seal = _seal(kept, params["first_gen_tokens"], params["ctx_request_id"])
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise RequestError(f"the opaque state can't be read: {error!r}") from error
    if seal != state["seal"]:
        raise RequestError("the opaque state is not the one that was given away")
    return kept


def _seal(kept: Mapping[str, Any], first: Sequence[int], number: int) -> str:
    text = json.dumps([kept, list(first), number], sort_keys=True)
    return hashlib.blake2b(text.encode(), key=_SECRET).hexdigest()
