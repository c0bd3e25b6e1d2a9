"""How a completion goes on at another SGLang engine (0.5.23): token ids in, as a completion.

Only completions do. A streamed chat that asks for token ids is refused (entrypoints/openai/serving_chat.py,
`return_token_ids is not supported with streaming`), and what it can have instead comes with the last event
alone (`return_output_ids_in_sglext`), which a lost engine does not write. Log probabilities name tokens by
their text, which is not enough. Paths below are SGLang's, below sglang/srt/.
"""

from __future__ import annotations

from typing import Any

import msgspec

Json = dict[str, Any]

# The same wherever in the answer sampling starts (openai/serving_completions.py, _build_sampling_params).
_SAMPLING = (
    "model", "temperature", "top_p", "top_k", "min_p", "seed", "logit_bias", "stop", "stop_token_ids",
    "no_stop_trim", "ignore_eos", "skip_special_tokens", "user", "priority", "cache_salt", "extra_key",
    "lora_path", "custom_labels",
)  # fmt: skip
# Their state is what was generated so far, which the next engine takes for a part of the prompt: penalties
# (sampling/penaltylib: all of them count output tokens alone), grammars, a pattern across the cut.
_STATEFUL = (
    "presence_penalty", "frequency_penalty", "json_schema", "regex", "ebnf", "stop_regex", "watermark",
    "custom_logit_processor", "custom_params", "session_id", "session_params",
)  # fmt: skip
# The answer is more than text, or not of this prompt alone.
_SHAPED = (
    "echo", "logprobs", "suffix", "return_hidden_states", "return_routed_experts",
    "return_cached_tokens_details", "return_spec_tokens_details", "images_config", "mm_processor_kwargs",
)  # fmt: skip
_MAX_TOKENS = 16


def obstacle(body: Json, sent: str) -> str | None:
    """Why no other engine can go on in the middle of this request's answer, after the text `sent`; None when
    one can."""
    if "messages" in body:
        return "a chat, whose tokens SGLang does not name in a stream,"
    for name in (*_STATEFUL, *_SHAPED):
        if body.get(name):
            return f"`{name}`"
    if body.get("repetition_penalty") not in (None, 1):
        return "`repetition_penalty`"
    if body.get("logprobs") == 0 and body.get("logprobs") is not False:
        return "`logprobs`"
    kind = body.get("response_format")
    if isinstance(kind, dict) and kind.get("type") not in (None, "text"):
        return "`response_format`"
    if (body.get("n") or 1) != 1:
        return "`n`"
    stops = _stops(body)
    if stops and body.get("no_stop_trim"):
        return "`no_stop_trim`"
    # SGLang writes the beginning of a stop string like any other text (managers/detokenizer_manager.py), and
    # the next engine looks for it in what it writes itself.
    if any(sent.endswith(stop[:length]) for stop in stops for length in range(1, len(stop))):
        return "text that may be the beginning of a stop string"
    return None


def _stops(body: Json) -> tuple[str, ...]:
    stops = body.get("stop") or ()
    return (stops,) if isinstance(stops, str) else tuple(stops)


def tokenize(body: Json) -> Json | None:
    """The body for /tokenize that gives a completion's prompt; None when it can't."""
    if not isinstance(body.get("prompt"), str):
        return None
    return {name: body[name] for name in ("model", "prompt") if body.get(name) is not None}


def budget(body: Json) -> int:
    """The most tokens of the whole answer."""
    most = body.get("max_tokens")
    return _MAX_TOKENS if most is None else int(most)


def resume(body: Json, prompt: msgspec.Raw, *, generated: int, max_tokens: int) -> Json:
    """The completion that goes on after `prompt`: all token ids so far, `generated` of them the answer's."""
    request = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
    request |= {
        "prompt": prompt,
        # Where the server has a template for completions, this one is not put into it.
        "suffix": "",
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if (least := body.get("min_tokens") or 0) > generated:
        request["min_tokens"] = least - generated
    return request
