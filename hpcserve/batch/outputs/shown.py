"""What a table shows of an answer, whichever route it came from."""

from __future__ import annotations

import base64
import binascii
from array import array
from collections.abc import Iterable
from typing import Any

import msgspec

from .answers import Answer, failure
from .text import json_text

_decode = msgspec.json.Decoder().decode
_BROKEN = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class Shown(msgspec.Struct, kw_only=True):
    """The columns that an answer adds to a table."""

    response: str | array[float] | None = None
    """Text, or the vector of an embedding. JSON text of what is neither: tool calls without a text, scores,
    or all the choices or vectors where one request asked for several."""
    reasoning: str | None = None
    finish_reason: str | None = None
    usage: dict[str, int | None] | None = None
    error: str | None = None
    """`code: message`"""


def shown(answer: Answer) -> Shown:
    """Never raises: a member of a wrong type counts as none, a body without any known one is shown whole."""
    failed = failure(answer)
    if failed is not None:
        return Shown(error=f"{failed[0]}: {failed[1]}")
    try:
        body = _decode(answer.body)
    except _BROKEN:  # a number that no float holds, for one
        return Shown(response=answer.body.decode("utf-8", "replace"))
    if not isinstance(body, dict):
        return Shown(response=json_text(body))
    found = _shown(body)
    found.usage = _usage(body.get("usage"))
    return found


def _shown(body: dict[str, Any]) -> Shown:
    choices = _objects(body.get("choices"))
    if choices:
        texts = [_of_choice(choice) for choice in choices]
        reason = choices[0].get("finish_reason")
        return Shown(
            response=texts[0] if len(texts) == 1 else json_text(texts),
            reasoning=_reasoning(choices[0]),
            finish_reason=reason if isinstance(reason, str) else None,
        )
    output = _objects(body.get("output"))
    if output:
        return _of_responses(body, output)
    data = _objects(body.get("data"))
    vectors = [found for found in (vector(entry.get("embedding")) for entry in data) if found is not None]
    if len(data) == 1 and vectors:
        return Shown(response=vectors[0])
    for scores in (data, _objects(body.get("results"))):
        if scores:
            return Shown(response=json_text(scores))
    return Shown(response=json_text(body))


def _objects(value: object) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _of_choice(choice: dict[str, Any]) -> str | None:
    """A completion's text; a message's content, or if there is none its tool calls or its refusal."""
    message = choice.get("message")
    if not isinstance(message, dict):
        text = choice.get("text")
        return text if isinstance(text, str) else None
    content = message.get("content")
    if isinstance(content, str) and (content or not message.get("tool_calls")):
        return content
    for value in (content, message.get("tool_calls"), message.get("refusal")):
        if value:
            return value if isinstance(value, str) else json_text(value)
    return None


def _reasoning(choice: dict[str, Any]) -> str | None:
    """vLLM says `reasoning`, and said `reasoning_content` as SGLang does."""
    message = choice.get("message")
    if isinstance(message, dict):
        for name in ("reasoning", "reasoning_content"):
            if isinstance(message.get(name), str):
                return str(message[name])
    return None


def _of_responses(body: dict[str, Any], output: list[dict[str, Any]]) -> Shown:
    """An answer of /v1/responses: https://platform.openai.com/docs/api-reference/responses/object"""
    texts = _parts(entry.get("content") for entry in output if entry.get("type") == "message")
    thoughts = [entry for entry in output if entry.get("type") == "reasoning"]
    reasoning = _parts(entry.get("content") or entry.get("summary") for entry in thoughts)
    calls = [entry for entry in output if entry.get("type") not in ("message", "reasoning")]
    details = body.get("incomplete_details")
    reason = details.get("reason") if isinstance(details, dict) else body.get("status")
    return Shown(
        response="".join(texts) if texts or not calls else json_text(calls),
        reasoning="".join(reasoning) if reasoning else None,
        finish_reason=reason if isinstance(reason, str) else None,
    )


def _parts(contents: Iterable[object]) -> list[str]:
    parts = [part for content in contents for part in _objects(content)]
    return [part["text"] for part in parts if isinstance(part.get("text"), str)]


def vector(value: object) -> array[float] | None:
    """32-bit floats, from a list or from base64 (`encoding_format`)."""
    try:
        if isinstance(value, list):
            return array("f", value)
        if isinstance(value, str):
            return array("f", base64.b64decode(value, validate=True))
    except (TypeError, ValueError, OverflowError, binascii.Error):
        pass
    return None


def _usage(told: object) -> dict[str, int | None] | None:
    if not isinstance(told, dict):
        return None
    details = told.get("prompt_tokens_details") or told.get("input_tokens_details")
    return {
        "prompt_tokens": _count(told.get("prompt_tokens", told.get("input_tokens"))),
        "completion_tokens": _count(told.get("completion_tokens", told.get("output_tokens"))),
        "cached_tokens": _count(details.get("cached_tokens")) if isinstance(details, dict) else None,
    }


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 63 else None
