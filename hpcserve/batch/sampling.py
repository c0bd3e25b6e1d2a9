"""What `--sampling` may put into every request.

Engines pass over a key that they do not know: a misspelt one would be found when the whole dataset was
answered without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ..config.load import nearest
from ..errors import ConfigError

SET_BY_US = {
    "stream": "answers are read whole",
    "stream_options": "answers are read whole",
    "background": "answers are waited for",
    "n": "samples are requests of their own",
    "model": "it is the run's",
    "messages": "rows have them",
    "prompt": "rows have it",
}
"""Keys that can't be set, and why."""
_LEAVE = "Leave it out."
_INSTEAD = {
    "n": "Give --samples.",
    "messages": "Give --messages-column or --template.",
    "prompt": "Give --prompt-column.",
}

# The request's members at vLLM 0.32.0 (entrypoints/openai/*/protocol.py), less those above and those that the
# router sets; a test compares them with the installed vLLM.
_BOTH = frozenset(
    {
        "add_special_tokens", "allowed_token_ids", "bad_words", "cache_salt", "echo", "frequency_penalty",
        "ignore_eos", "include_stop_str_in_output", "length_penalty", "logit_bias", "logprob_token_ids",
        "logprobs", "max_tokens", "min_p", "min_tokens", "mm_payload", "presence_penalty", "priority",
        "prompt_logprobs", "repetition_detection", "repetition_penalty", "request_id", "response_format",
        "return_mm_kwargs", "return_token_ids", "return_token_offsets", "return_tokens_as_token_ids",
        "routed_experts_prompt_start", "seed", "session_id", "skip_special_tokens",
        "spaces_between_special_tokens", "stop", "stop_token_ids", "stream_interval", "structured_outputs",
        "temperature", "thinking_token_budget", "top_k", "top_p", "truncate_prompt_tokens",
        "truncation_side", "use_beam_search", "user", "vllm_xargs", "watermarking",
    }
)  # fmt: skip
CHAT_KEYS = _BOTH | {
    "add_generation_prompt", "chat_template", "chat_template_kwargs", "continue_final_message", "documents",
    "include_reasoning", "max_completion_tokens", "media_io_kwargs", "mm_processor_kwargs",
    "parallel_tool_calls", "reasoning_effort", "return_prompt_text", "tool_choice", "tools", "top_logprobs",
}  # fmt: skip
COMPLETION_KEYS = _BOTH | {"prompt_embeds", "suffix"}


def check_sampling(sampling: Mapping[str, Any], *, chat: bool) -> None:
    """`chat`: requests are chats, else completions. Raises ConfigError for a key that would have no effect,
    and for a value that every engine refuses in every row."""
    known = CHAT_KEYS if chat else COMPLETION_KEYS
    for name in sampling:
        if name in SET_BY_US:
            reason = SET_BY_US[name]
            raise ConfigError(f"--sampling: `{name}` can't be set: {reason}", hint=_INSTEAD.get(name, _LEAVE))
        if name not in known:
            raise _unknown(name, known, "chats" if chat else "completions")
    for name in ("max_tokens", "max_completion_tokens"):
        most = sampling.get(name)
        if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
            raise ConfigError(
                f"--sampling: `{name}` must be a whole number from 1, not {shown(most)}",
                hint=f"For example --sampling {name}=512.",
            )
    heat = sampling.get("temperature")
    if heat is not None and (not isinstance(heat, int | float) or isinstance(heat, bool) or not heat >= 0):
        raise ConfigError(
            f"--sampling: `temperature` must be a number from 0, not {shown(heat)}",
            hint="For example --sampling temperature=0.7.",
        )


def _unknown(name: str, known: frozenset[str], what: str) -> ConfigError:
    near = nearest(name, sorted(known))
    meant = "" if near is None else f"Did you mean `{near}`? "
    return ConfigError(
        f"--sampling: {what} have no member `{name}`, and an engine would pass over it",
        hint=f"{meant}What only your engine's plugins know goes into `vllm_xargs`.",
    )


def shown(value: Any) -> str:
    """A value in an error message."""
    if value is None or isinstance(value, str | bool | int | float):
        text = msgspec.json.encode(value).decode()
        return text if len(text) <= 60 else f"{text[:57]}…"
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else "this type"
