"""Values arrive in bash as they were written, whatever is in them."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcserve.errors import ConfigError
from hpcserve.render.quoting import Expanding, directive, quote

TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=20)


def through_bash(words: str, **env: str) -> list[str]:
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {words}"],
        capture_output=True,
        env={"PATH": "/usr/bin:/bin", **env},
        check=True,
    )
    return done.stdout.decode().split("\0")[:-1]


@settings(max_examples=25)
@given(st.lists(TEXT, min_size=1, max_size=8))
def test_words_survive(values: list[str]) -> None:
    assert through_bash(" ".join(map(quote, values))) == values


def test_variables_expand_where_they_are_meant_to_and_nothing_else_does() -> None:
    word = quote(Expanding('~/a $USER/${JOB}x "q" `id` $(id) \\ $1'))
    assert through_bash(word, HOME="/home/al", USER="al", JOB="7") == [
        '/home/al/a al/7x "q" `id` $(id) \\ $1'
    ]


@pytest.mark.parametrize("value", ["a\nb", "a\x00", "\x1b[0m", "a\r"])
def test_control_characters_are_refused(value: str) -> None:
    for spell in (quote, directive):
        with pytest.raises(ConfigError, match="control character"):
            spell(value)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("--nodes=2", "--nodes=2"),
        ("--output=/a b/%j", '"--output=/a b/%j"'),
        ('--comment=say "x" \\', '"--comment=say \\"x\\" \\\\"'),
        ("--comment=a#b", '"--comment=a#b"'),
        ("--constraint=gpu&hbm80g|x", "--constraint=gpu&hbm80g|x"),
    ],
)
def test_directives(value: str, line: str) -> None:
    assert directive(value) == line
