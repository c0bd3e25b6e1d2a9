"""How an answer goes on at another vLLM engine: token ids in, as a completion (vLLM 0.32).

Both routes sample alike from the same parameters (entrypoints/openai/*/protocol.py, to_sampling_params);
what a chat has besides is in its prompt already. Paths below are vLLM's.
"""

from __future__ import annotations

from typing import Any

import msgspec

Json = dict[str, Any]

# The same in both routes, and the same wherever in the answer sampling starts.
_SAMPLING = (
    "model", "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "logit_bias",
    "allowed_token_ids", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
    "skip_special_tokens", "spaces_between_special_tokens", "user", "priority", "cache_salt", "vllm_xargs",
    "stream_interval",
)  # fmt: skip
# Their state is what was generated so far, which the next engine takes for a part of the prompt: penalties
# (v1/sample/ops/penalties.py counts output tokens alone), grammars, bad words across the cut.
_STATEFUL = (
    "presence_penalty", "frequency_penalty", "bad_words", "structured_outputs", "thinking_token_budget",
    "repetition_detection", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
)  # fmt: skip
# The answer is more than text, or there are several.
_SHAPED = (
    "tools",
    "functions",
    "use_beam_search",
    "echo",
    "logprobs",
    "prompt_logprobs",
    "prompt_embeds",
    "suffix",
)
# What makes a chat's prompt, as /tokenize knows it (entrypoints/serve/tokenize/protocol.py).
_TEMPLATE = (
    "model", "messages", "add_generation_prompt", "continue_final_message", "add_special_tokens",
    "chat_template", "chat_template_kwargs", "mm_processor_kwargs", "media_io_kwargs",
)  # fmt: skip
# What makes it as well, and /tokenize does not know.
_BEYOND = ("documents", "reasoning_effort", "truncate_prompt_tokens", "response_format", "tool_choice")
_COMPLETION_MAX_TOKENS = 16


def obstacle(body: Json) -> str | None:
    """Why no other engine can go on in the middle of this request's answer; None when one can."""
    for name in (*_STATEFUL, *_SHAPED):
        if body.get(name):
            return f"`{name}`"
    # 0 is a wish of a completion, and none of a chat.
    if body.get("logprobs") == 0 and body.get("logprobs") is not False:
        return "`logprobs`"
    kind = body.get("response_format")
    if isinstance(kind, dict) and kind.get("type") not in (None, "text"):
        return "`response_format`"
    if (body.get("n") or 1) != 1:
        return "`n`"
    if any(part for message in _messages(body) for part in _parts(message)):
        return "content that is not text"
    return None


def _messages(body: Json) -> list[Any]:
    messages = body.get("messages")
    return messages if isinstance(messages, list) else []


def _parts(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return []
    return [part for part in content if not (isinstance(part, dict) and part.get("type") == "text")]


def tokenize(body: Json) -> Json | None:
    """The body for /tokenize that gives the request's prompt; None when it can't."""
    if any(body.get(name) is not None for name in _BEYOND):
        return None
    if "messages" in body:
        return {name: body[name] for name in _TEMPLATE if body.get(name) is not None}
    if not isinstance(body.get("prompt"), str):
        return None
    kept = ("model", "prompt", "add_special_tokens")
    return {name: body[name] for name in kept if body.get(name) is not None}


def budget(body: Json) -> int | None:
    """The most tokens of the whole answer; None: what the model's context has room for."""
    if "messages" in body:
        most = body.get("max_completion_tokens")
        return most if most is not None else body.get("max_tokens")
    most = body.get("max_tokens")
    return _COMPLETION_MAX_TOKENS if most is None else most


def resume(body: Json, prompt: msgspec.Raw, *, generated: int, max_tokens: int) -> Json:
    """The completion that goes on after `prompt`: all token ids so far, `generated` of them the answer's."""
    request = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
    request |= {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if (least := body.get("min_tokens") or 0) > generated:
        request["min_tokens"] = least - generated
    if budget(body) is None:
        # A completion without a limit would get one; the answer still ends by itself.
        request.setdefault("ignore_eos", False)
    return request
