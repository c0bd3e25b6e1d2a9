"""How many tokens a text has: counted by the model's own tokenizer where that is on this host, else guessed.

Only `tokenizer.json` is read (https://huggingface.co/docs/tokenizers), never the network. The count is of the
text as it is: what a chat template adds around it is not in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.model_facts import is_local, read_facts
from ..errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTES_PER_TOKEN = 4
"""What English text has; other languages, code and numbers have fewer."""


class Counter:
    """Counts the tokens of texts."""

    def __init__(self, tokenizer: Tokenizer | None, source: str) -> None:
        self._tokenizer = tokenizer
        self.source = source
        """For people: the tokenizer's file, or why there is none."""

    @classmethod
    def for_model(
        cls, model: str, *, revision: str | None = None, environ: Mapping[str, str] = os.environ
    ) -> Counter:
        """For a directory, a tokenizer.json, or a hub id with files in the local cache.

        A model that is unknown here, or whose file can't be used, gives one that guesses: `source` says why.
        """
        path = _file(model, revision, environ)
        if path is None:
            return cls(None, f"no tokenizer.json of {model} on this host")
        try:
            from tokenizers import Tokenizer
        except ImportError:
            return cls(None, "the package `tokenizers` is not installed")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            return cls(None, f"{path} can't be used: {error}")
        # Some files tell to cut or to fill texts to the length that the model was trained with.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, str(path))

    @property
    def exact(self) -> bool:
        """Whether tokens are counted, not guessed from bytes."""
        return self._tokenizer is not None

    def count(self, text: bytes) -> int:
        return self.count_all((text,))[0]

    def count_all(self, texts: Sequence[bytes]) -> list[int]:
        """Of some thousand texts at once: the tokenizer uses all cores then. They need not be UTF-8."""
        if self._tokenizer is None:
            return [-(-len(text) // BYTES_PER_TOKEN) for text in texts]
        decoded = [text.decode("utf-8", "replace") for text in texts]
        found = self._tokenizer.encode_batch_fast(decoded, add_special_tokens=False)
        return [len(encoding) for encoding in found]


def _file(model: str, revision: str | None, environ: Mapping[str, str]) -> Path | None:
    if is_local(model):
        path = Path(model).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
    else:
        try:
            facts = read_facts(model, revision=revision, environ=environ)
        except ConfigError:
            return None  # whoever launches that model says what is wrong with it
        if facts is None:
            return None
        path = Path(facts.path) / "tokenizer.json"
    return path if path.is_file() else None
