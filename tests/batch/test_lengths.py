"""Tokens are counted by the model's own tokenizer, or guessed, and it is said which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcserve.batch.lengths import Counter

tokenizers = pytest.importorskip("tokenizers")

TEXT = b"one two three four five"


def write_tokenizer(directory: Path, *, longest: int | None = None, padded: int | None = None) -> Path:
    """A tokenizer of words, with a special token in front as chat models have one."""
    directory.mkdir(parents=True, exist_ok=True)
    words = {"[UNK]": 0, "<s>": 1} | {word: n + 2 for n, word in enumerate(TEXT.decode().split())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    if longest:
        tokenizer.enable_truncation(longest)
    if padded:
        tokenizer.enable_padding(length=padded)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_a_directory_with_a_tokenizer_counts_words_not_bytes(tmp_path: Path) -> None:
    counter = Counter.for_model(str(write_tokenizer(tmp_path)))
    assert counter.exact
    assert counter.source == str(tmp_path / "tokenizer.json")
    assert counter.count(TEXT) == 5
    assert counter.count_all([TEXT, b"", b"one unknown"]) == [5, 0, 2]
    assert Counter.for_model(str(tmp_path / "tokenizer.json")).exact


def test_a_file_that_tells_to_cut_or_fill_texts_is_not_obeyed(tmp_path: Path) -> None:
    assert Counter.for_model(str(write_tokenizer(tmp_path / "a", longest=3))).count(TEXT) == 5
    assert Counter.for_model(str(write_tokenizer(tmp_path / "b", padded=64))).count(TEXT) == 5


def test_bytes_that_are_not_utf_8_are_counted_too(tmp_path: Path) -> None:
    assert Counter.for_model(str(write_tokenizer(tmp_path))).count(b"one \xff\xfe two") == 3


def test_a_hub_id_is_looked_up_in_the_local_cache(tmp_path: Path) -> None:
    base = tmp_path / "hub" / "models--org--name"
    snapshot = write_tokenizer(base / "snapshots" / "abc")
    (snapshot / "config.json").write_text(json.dumps({}))
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text("abc")
    counter = Counter.for_model("org/name", environ={"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert counter.exact and counter.count(TEXT) == 5
    other = Counter.for_model("org/other", environ={"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert not other.exact
    assert other.source == "no tokenizer.json of org/other on this host"


@pytest.mark.parametrize("model", ["/does/not/exist", "no such: model"])
def test_without_a_tokenizer_four_bytes_are_a_token(model: str) -> None:
    counter = Counter.for_model(model)
    assert not counter.exact
    assert counter.count_all([b"", b"a", b"abcd", b"abcde"]) == [0, 1, 1, 2]


def test_a_broken_tokenizer_is_named_and_guessed_for(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"half": ')
    counter = Counter.for_model(str(tmp_path))
    assert not counter.exact
    assert counter.source.startswith(f"{tmp_path / 'tokenizer.json'} can't be used: ")
    assert counter.count(b"12345678") == 2
