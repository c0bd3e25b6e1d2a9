"""Bodies of /v1/completions and /v1/chat/completions, checked as vLLM checks them."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import language, tokens
from .flags import Flags
from .sequence import Sampling

Json = Mapping[str, Any]

_COMPLETION_MAX_TOKENS = 16
_MOST_PROMPTS = 1024


class RequestError(Exception):
    """A request that is refused; the fields are those of vLLM's error body."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "BadRequestError",
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param

    def body(self, dialect: str = "vllm") -> dict[str, Any]:
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}
        # As members of the body itself: SGLang's openai/serving_base.py.
        return {"error": error} if dialect == "vllm" else {"object": "error", **error}


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A checked request: each of `prompts` is answered `len(samplings)` times."""

    request_id: str
    model: str
    chat: bool
    prompts: tuple[list[int], ...]
    samplings: tuple[Sampling, ...]
    stream: bool
    include_usage: bool
    continuous_usage: bool
    echo: str | None
    """Text that comes before each answer."""
    echo_prompt: bool
    return_token_ids: bool
    kv_params: Json | None
    cache_salt: str | None


def completion(body: Json, flags: Flags, request_id: str | None) -> Generation:
    """Raises RequestError."""
    prompts = prompts_of(body.get("prompt"), "prompt")
    return _generation(body, flags, "cmpl", request_id, prompts)


def chat(body: Json, flags: Flags, request_id: str | None) -> Generation:
    """Raises RequestError."""
    return _generation(body, flags, "chatcmpl", request_id, (tokens.encode(chat_text(body)),))


def chat_text(body: Json) -> str:
    """The conversation as the prompt's text. Raises RequestError."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise RequestError("messages must be a list of objects with a role", param="messages")
    continue_final = bool(body.get("continue_final_message", False))
    add_prompt = bool(body.get("add_generation_prompt", True))
    if continue_final and add_prompt:
        raise RequestError("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
    return tokens.chat_prompt(
        messages,
        tools=body.get("tools"),
        add_generation_prompt=add_prompt,
        continue_final_message=continue_final,
    )


def check_model(body: Json, flags: Flags) -> str:
    """The requested model. Raises RequestError 404 for another one."""
    model = body.get("model")
    if model is None or model == "":
        return flags.served_name
    if model not in flags.served_model_names:
        raise RequestError(
            f"The model `{model}` does not exist.", status=404, kind="NotFoundError", param="model"
        )
    return str(model)


def prompts_of(value: Any, param: str) -> tuple[list[int], ...]:
    """Token ids of a text, of token ids, or of a list of either. Raises RequestError."""
    if isinstance(value, str) and value:
        return (tokens.encode(value),)
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return (check_token_ids(value),)
        if len(value) > _MOST_PROMPTS:
            raise RequestError(
                f"{param} list length {len(value)} exceeds the maximum allowed count of {_MOST_PROMPTS}.",
                param=param,
            )
        return tuple(_one_prompt(item, param) for item in value)
    raise RequestError(f"Either {param} or prompt_embeds must be provided and non-empty.", param=param)


def check_token_ids(ids: list[int]) -> list[int]:
    """Raises RequestError for an id that is no token."""
    for token in ids:
        if not 0 <= token < tokens.VOCABULARY_SIZE:
            raise RequestError(f"Token id {token} is out of vocabulary", param="prompt")
    return ids


def check_length(length: int, flags: Flags) -> None:
    """Raises RequestError for a prompt longer than the model's context."""
    if length > flags.max_model_len:
        raise RequestError(
            f"This model's maximum context length is {flags.max_model_len} tokens. However, your prompt"
            f" contains {length} input tokens, which exceeds this limit even without any output tokens."
            " Please reduce the length of the input prompt.",
            param="input_tokens",
        )


def _one_prompt(item: Any, param: str) -> list[int]:
    if isinstance(item, str) and item:
        return tokens.encode(item)
    if isinstance(item, list) and item and all(type(part) is int for part in item):
        return check_token_ids(item)
    raise RequestError(f"each {param} must be a text or a list of token ids", param=param)


def _generation(
    body: Json, flags: Flags, prefix: str, request_id: str | None, prompts: tuple[list[int], ...]
) -> Generation:
    model = check_model(body, flags)
    stream = bool(body.get("stream"))
    options = body.get("stream_options") or {}
    if options and not stream:
        raise RequestError("Stream options can only be defined when `stream=True`.", param="stream_options")
    chat = prefix == "chatcmpl"
    given = _max_tokens(body, chat, flags)
    for ids in prompts:
        check_length(len(ids), flags)
    n = _integer(body, "n", 1)
    if n < 1:
        raise RequestError(f"n must be at least 1, got {n}.", param="n")
    room = flags.max_model_len - max(map(len, prompts))
    default = room if chat else _COMPLETION_MAX_TOKENS
    # An answer of a given length is one of that length, unless the client says that it minds the end.
    ends_by_itself = given is None or body.get("ignore_eos") is False
    max_tokens = min(room, default if given is None else given)
    if max_tokens < 1:
        raise RequestError(f"max_tokens must be at least 1, got {max_tokens}.", param="max_tokens")
    kv_params = body.get("kv_transfer_params")
    if kv_params is not None and not isinstance(kv_params, dict):
        raise RequestError("kv_transfer_params must be an object", param="kv_transfer_params")
    echo = bool(body.get("echo"))
    usage = bool(options.get("include_usage"))
    return Generation(
        request_id=f"{prefix}-{request_id or uuid.uuid4().hex}",
        model=model,
        chat=chat,
        prompts=prompts,
        samplings=_samplings(body, chat, n, max_tokens, ends_by_itself=ends_by_itself),
        stream=stream,
        include_usage=usage,
        continuous_usage=usage and bool(options.get("continuous_usage_stats")),
        echo=_echoed(body) if echo and chat else None,
        echo_prompt=echo and not chat,
        return_token_ids=bool(body.get("return_token_ids")),
        kv_params=kv_params,
        cache_salt=body.get("cache_salt") or None,
    )


def _max_tokens(body: Json, chat: bool, flags: Flags) -> int | None:
    names = ("max_completion_tokens", "max_tokens") if chat else ("max_tokens",)
    for name in names:
        if body.get(name) is None:
            continue
        value = _integer(body, name, 0)
        if value < 1:
            raise RequestError(f"max_tokens must be at least 1, got {value}.", param="max_tokens")
        if value > flags.max_model_len:
            raise RequestError(
                f"{name}={value} cannot be greater than max_model_len={flags.max_model_len}."
                " Please request fewer output tokens.",
                param=name,
            )
        return value
    return None


def _samplings(
    body: Json, chat: bool, n: int, max_tokens: int, *, ends_by_itself: bool
) -> tuple[Sampling, ...]:
    temperature = _number(body, "temperature", 1.0)
    if not 0.0 <= temperature <= 2.0:
        problem = "must be non-negative" if temperature < 0 else "must be in [0, 2]"
        raise RequestError(f"temperature {problem}, got {temperature}.", param="temperature")
    min_tokens = _integer(body, "min_tokens", 0)
    if min_tokens < 0:
        raise RequestError(f"min_tokens must be greater than or equal to 0, got {min_tokens}.")
    if min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {min_tokens}."
        )
    seed = None if body.get("seed") is None else _integer(body, "seed", 0)
    stop = body.get("stop") or ()
    return tuple(
        Sampling(
            max_tokens=max_tokens,
            ends_by_itself=ends_by_itself and not body.get("ignore_eos"),
            min_tokens=min_tokens,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=frozenset(body.get("stop_token_ids") or ()),
            include_stop=bool(body.get("include_stop_str_in_output")),
            # A greedy answer does not depend on the seed.
            salt=0 if temperature == 0.0 else language.salt(seed, sample),
            logprobs=_logprobs(body, chat),
        )
        for sample in range(n)
    )


def _logprobs(body: Json, chat: bool) -> int | None:
    if not chat:
        return None if body.get("logprobs") is None else _at_least_zero(body, "logprobs")
    if not body.get("logprobs"):
        if body.get("top_logprobs"):
            raise RequestError(
                "when using `top_logprobs`, `logprobs` must be set to true.", param="top_logprobs"
            )
        return None
    return _at_least_zero(body, "top_logprobs")


def _at_least_zero(body: Json, name: str) -> int:
    value = _integer(body, name, 0)
    if value < 0:
        raise RequestError(f"`{name}` must be a positive value.", param=name)
    return value


def _echoed(body: Json) -> str:
    """Chat's `echo`: the last message, if it is the assistant's."""
    last = body["messages"][-1] if body["messages"] else {}
    content = last.get("content")
    return content if last.get("role") == "assistant" and isinstance(content, str) else ""


def _integer(body: Json, name: str, default: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int:
        raise RequestError(f"`{name}` must be an integer.", param=name)
    return value


def _number(body: Json, name: str, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RequestError(f"{name} must be a finite number, got {value}.", param=name)
    return float(value)
