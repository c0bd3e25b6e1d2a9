"""Prompts for a live replay: equal block ids give equal text, other ids other text.

A word of two letters and the space before it are one token to the fake engine's tokenizer, and to the
one that `vocabulary` makes for Dynamo's mocker: so text blocks are KV blocks, to the token.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

from ..trace import TraceRequest
from .scale import Scale

_VOWELS, _CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"
WORDS = tuple(first + second for first in (_CONSONANTS + _VOWELS) for second in (_VOWELS + _CONSONANTS))[:256]
"""One for each value of a byte."""


def text(request: TraceRequest, scale: Scale) -> str:
    """As many words as the scaled prompt has tokens."""
    size = scale.block_tokens
    left = scale.prompt_tokens(request)
    blocks = []
    for block in request.blocks:
        if left < size:
            if left > 0:
                blocks.append(" ".join(_block(block, size).split(" ")[:left]))
            break
        blocks.append(_block(block, size))
        left -= size
    return " ".join(blocks)


@lru_cache(maxsize=4096)
def _block(block: int, words: int) -> str:
    drawn = hashlib.shake_128(block.to_bytes(16, "big", signed=True)).digest(words)
    return " ".join([WORDS[byte] for byte in drawn])
