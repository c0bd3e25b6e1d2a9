"""Taking a request for several choices apart, and putting their answers together again.

Prefill and decode hand over the KV of one prompt at a time, so `n` choices of `m` prompts become n·m
requests. Choice i of prompt p has index p·n + i, and its seed is `seed + i`: what one engine does itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..http.errors import HttpError
from .call import Json

_MOST = 4096
_SUMMED = ("completion_tokens", "completion_tokens_details")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of the requests a client's request was taken apart into."""

    index: int
    first_of_prompt: bool
    """Its prompt is counted in `usage`; its siblings' is the same one."""
    body: Json

    def request_id(self, whole: str) -> str:
        """The id engines see: theirs must differ within one client request."""
        return f"{whole}-{self.index}"


def split(body: Json, *, chat: bool) -> list[Choice]:
    """The single requests in `body`; just one when it asks for one choice of one prompt.

    A malformed `n` or `prompt` is left in place for the engine to refuse in its own words.
    Raises HttpError 400 for more choices than one request may cost.
    """
    prompts: list[Any] = [None] if chat else _prompts(body.get("prompt"))
    n = body.get("n")
    # All beams of a beam search live in one engine.
    count = n if type(n) is int and n > 1 and not body.get("use_beam_search") else 1
    if len(prompts) * count > _MOST:
        raise HttpError(400, f"the request asks for {len(prompts) * count} choices; {_MOST} are the most")
    if len(prompts) * count == 1:
        return [Choice(index=0, first_of_prompt=True, body=body)]
    choices = []
    for position, prompt in enumerate(prompts):
        for i in range(count):
            single = dict(body)
            if len(prompts) > 1:
                single["prompt"] = prompt
            if count > 1:
                single["n"] = 1
                if type(single.get("seed")) is int:
                    single["seed"] += i
            choices.append(Choice(index=position * count + i, first_of_prompt=i == 0, body=single))
    return choices


def _prompts(prompt: Any) -> list[Any]:
    """The prompts in a completion's `prompt`: a text, token ids, or a list of either."""
    if isinstance(prompt, list) and len(prompt) > 1 and not all(type(item) is int for item in prompt):
        return prompt
    return [prompt]


def add_usage(total: Json | None, part: Any, *, with_prompt: bool) -> Json | None:
    """`total` plus one choice's usage; `with_prompt` says whether its prompt counts."""
    if not isinstance(part, dict):
        return total
    if total is None:
        total = {**part, **_zeroed(part)}
    for key, value in part.items():
        if key == "total_tokens" or (not with_prompt and key not in _SUMMED):
            continue
        total[key] = _sum(total.get(key), value)
    total["total_tokens"] = (total.get("prompt_tokens") or 0) + (total.get("completion_tokens") or 0)
    return total


def _zeroed(part: Json) -> Json:
    return {key: 0 if _is_number(value) else None for key, value in part.items()}


def _sum(total: Any, value: Any) -> Any:
    if _is_number(value):
        return (total or 0) + value
    if isinstance(value, dict):
        old = total if isinstance(total, dict) else {}
        return {**old, **{key: _sum(old.get(key), inner) for key, inner in value.items()}}
    return total if value is None else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole_id(part_id: Any, choice: Choice, request_id: str) -> Any:
    """An engine's response id as it would be for the whole request: without the choice's suffix."""
    part = choice.request_id(request_id)
    return part_id.replace(part, request_id) if isinstance(part_id, str) else part_id


def join(parts: list[tuple[Choice, Json]], request_id: str) -> Json:
    """One response from the answers to all choices, in order of index."""
    whole = dict(parts[0][1])
    whole["id"] = whole_id(whole.get("id"), parts[0][0], request_id)
    for only_for_one in ("kv_transfer_params", "metrics"):
        if only_for_one in whole:
            whole[only_for_one] = None
    whole["choices"] = []
    usage: Json | None = None
    for choice, part in parts:
        whole["choices"] += [{**entry, "index": choice.index} for entry in part.get("choices") or ()]
        usage = add_usage(usage, part.get("usage"), with_prompt=choice.first_of_prompt)
    if usage is not None:
        whole["usage"] = usage
    return whole
