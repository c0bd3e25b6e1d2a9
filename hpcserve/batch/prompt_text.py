"""The text of a request's prompt: for hashing shared beginnings, and for counting tokens.

It is not what the model's chat template makes of it, but begins alike where that does, and is about as long.
Images, sound and other binary parts stand there as a short hash.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import xxhash

PROMPTS: Mapping[str, tuple[str, ...]] = {
    "/v1/chat/completions": ("messages",),
    "/v1/completions": ("prompt", "prompt_embeds"),
    "/v1/embeddings": ("input", "messages"),
    "/v1/score": ("text_1", "text_2", "queries", "documents", "items", "data_1", "data_2"),
    "/v1/rerank": ("query", "documents"),
    "/v1/responses": ("input",),
}
"""Members of the body that are the prompt, in the order in which the model reads them."""

_BEFORE: Mapping[str, tuple[str, ...]] = {
    "/v1/chat/completions": ("tools",),
    "/v1/responses": ("instructions", "tools"),
}
"""Members that chat templates put before the prompt."""

_BINARY = ("image", "input_image", "audio", "input_audio", "video", "file", "input_file")


def prompt_text(path: str, body: Mapping[str, Any]) -> bytes:
    """UTF-8. `path` is one of PROMPTS. Raises UnicodeEncodeError."""
    members = (*_BEFORE.get(path, ()), *PROMPTS[path])
    return "\n".join(
        piece
        for member in members
        if body.get(member) is not None
        for piece in ((_hash(body[member]),) if member == "prompt_embeds" else _pieces(body[member]))
    ).encode()


def token_ids(prompt: Any) -> bool:
    """A prompt that is a list of token ids."""
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in prompt)
    )


def _pieces(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif token_ids(value):
        yield " ".join(map(str, value))
    elif isinstance(value, list):
        for item in value:
            yield from _pieces(item)
    elif isinstance(value, Mapping):
        yield from _parts(value)
    elif value is not None:
        yield str(value)


def _parts(value: Mapping[str, Any]) -> Iterator[str]:
    """Of a message, a tool, or a part of a message's content."""
    kind = value.get("type")
    if isinstance(kind, str) and kind.startswith(_BINARY):
        yield f"<{kind} {_hash(value)}>"
    elif isinstance(value.get("text"), str):
        yield value["text"]
    elif "role" in value:
        yield str(value["role"])
        yield from _pieces(value.get("content"))
        if value.get("tool_calls"):
            yield msgspec.json.encode(value["tool_calls"]).decode()
    else:
        yield msgspec.json.encode(value).decode()


def _hash(value: Any) -> str:
    return xxhash.xxh3_64_hexdigest(msgspec.json.encode(value))
