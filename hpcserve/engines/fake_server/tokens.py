"""A toy tokenizer: reversible, without a vocabulary file, and stable at word boundaries.

Text is cut at words (a word takes the space before it), and each word's UTF-8 bytes are cut in pieces
of one to three bytes; a token id is its piece's bytes. So the tokens of a conversation start with the
tokens of its earlier turns, and a prefix cache works as it does with a real tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

SPECIALS = ("<|pad|>", "<|im_start|>", "<|im_end|>")
IM_START, IM_END = 1, 2
EOS = IM_END

_ONE_BYTE = len(SPECIALS)
_TWO_BYTES = _ONE_BYTE + (1 << 8)
_THREE_BYTES = _TWO_BYTES + (1 << 16)
VOCABULARY_SIZE = _THREE_BYTES + (1 << 24)

_SPECIAL_IDS = {text: i for i, text in enumerate(SPECIALS)}
_WORDS = re.compile(r"<\|(?:pad|im_start|im_end)\|>| ?\w+| ?[^\s\w]+?(?=<\|)| ?[^\s\w]+|\s+(?!\S)|\s+")


def encode(text: str) -> list[int]:
    """Token ids of `text`; special tokens are recognised in it."""
    ids: list[int] = []
    for word in _WORDS.findall(text):
        special = _SPECIAL_IDS.get(word)
        if special is not None:
            ids.append(special)
            continue
        raw = word.encode("utf-8", "surrogatepass")
        ids.extend(_piece_id(raw[i : i + 3]) for i in range(0, len(raw), 3))
    return ids


def token_bytes(token: int, *, special: bool = True) -> bytes:
    """The bytes of one token; with `special=False` special tokens are empty."""
    if token >= _THREE_BYTES:
        return (token - _THREE_BYTES).to_bytes(3, "big")
    if token >= _TWO_BYTES:
        return (token - _TWO_BYTES).to_bytes(2, "big")
    if token >= _ONE_BYTE:
        return bytes((token - _ONE_BYTE,))
    return SPECIALS[token].encode() if special else b""


def decode(tokens: Iterable[int], *, special: bool = True) -> str:
    """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
    return b"".join(token_bytes(token, special=special) for token in tokens).decode("utf-8", "replace")


def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Any = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """The conversation in ChatML. `continue_final_message` leaves the last message open-ended."""
    parts: list[str] = []
    if tools:
        parts.append(f"<|im_start|>system\n{msgspec.json.encode(tools).decode()}<|im_end|>\n")
    for i, message in enumerate(messages):
        parts.append(f"<|im_start|>{message['role']}\n{_content(message)}")
        if continue_final_message and i == len(messages) - 1:
            return "".join(parts)
        parts.append("<|im_end|>\n")
    if add_generation_prompt:
        parts.append("<|im_start|>assistant\n")
    return "".join(parts)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None:
        calls = message.get("tool_calls")
        return msgspec.json.encode(calls).decode() if calls else ""
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) for part in content)


def _piece_id(piece: bytes) -> int:
    value = int.from_bytes(piece, "big")
    if len(piece) == 3:
        return _THREE_BYTES + value
    return (_TWO_BYTES if len(piece) == 2 else _ONE_BYTE) + value
