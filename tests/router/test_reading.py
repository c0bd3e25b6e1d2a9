"""Long bodies read by the compiled way: what is left out before msgspec reads them changes nothing."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcserve.http.compiled import compiled
from hpcserve.http.errors import HttpError
from hpcserve.router import call, prompt

reading = compiled("router.reading", "a test")
assert reading is not None, "`make venv` compiles it, with a C compiler and Python's headers"

REFUSALS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
RUN = "a run of plain text " * 20
TEXTS = (
    "", "a", RUN, RUN * 30, RUN + "\\", RUN + '"', "\n" + RUN, RUN + "\n" + RUN, "é" + RUN, RUN + "é",
    "€" * 300, "x" * 127, "x" * 128, "x" * 129, "x" * 136, "😀" + RUN, "\x7f" * 200, RUN + ":",
    "\u2028" + RUN,
)  # fmt: skip
ODD = (
    b"", b'"', b"\\", b"\\u", b"\\u12", b"\\u00e9", b"\\ud83d", b"\\x", b"\n", b"\x00", b"\x1f", b"\x7f",
    b"\xff", b"\xc3", b"\xc3\xa9", b"{", b"}", b"[", b"]", b",", b":", b" ", b"1", b"null", b"1e999", b"-",
    b"\r\n",
    RUN.encode(), b'"' + RUN.encode() + b'":1,', b'"a":"' + RUN.encode() + b'",',
    b'"' + RUN.encode() + b'" \t:2,',
    b"[" * 2000, b'{"a":' * 2000,
)  # fmt: skip


def outcome(read: Any, *given: Any) -> list[tuple[str, bytes]] | str:
    try:
        found = read(*given)
    except REFUSALS:
        return "refused"
    except HttpError as error:
        assert error.status == 400
        return "refused"
    return [(name, bytes(value)) for name, value in found.items()]


def same(body: bytes, before: bytes = b"") -> list[tuple[str, bytes]] | str:
    ours = outcome(reading.members, before + body, len(before))
    assert ours == outcome(call.members, body)
    return ours


def long(dice: random.Random, depth: int = 0) -> Any:
    kind = dice.randrange(7 if depth < 3 else 4)
    if kind < 3:
        return dice.choice(TEXTS)
    if kind == 3:
        return dice.choice((1, -2.5, True, None, 3e20, 10**30))
    if kind == 4:
        return {dice.choice(TEXTS[:4]) + str(at): long(dice, depth + 1) for at in range(dice.randrange(4))}
    return [long(dice, depth + 1) for _ in range(dice.randrange(5))]


@pytest.mark.parametrize("seed", range(40))
def test_members_are_those_of_the_reference(seed: int) -> None:
    dice = random.Random(seed)
    accepted = 0
    for _ in range(40):
        given = {
            "model": "m",
            "messages": [{"role": "user", "content": RUN * 15}, long(dice)],
            dice.choice(("prompt", "é", RUN)): long(dice),
            "max_tokens": 7,
        }
        indent = dice.choice((None, None, 1))
        body = json.dumps(given, ensure_ascii=dice.random() < 0.5, indent=indent).encode()
        accepted += same(body, dice.choice((b"", b"head", b"\xff\n"))) != "refused"
        for _ in range(3):
            at, gap = dice.randrange(len(body)), dice.choice((0, 0, 1, 5, 200))
            same(body[:at] + dice.choice(ODD) + body[at + gap :])
        same(body[: dice.randrange(len(body))])
    assert accepted == 40


def test_more_stretches_than_are_kept_track_of() -> None:
    for count in (255, 256, 257, 700):
        body = json.dumps({"a": 1, "messages": [RUN] * count, "z": [RUN]}).encode()
        assert same(body) != "refused"
        assert same(body[:-2] + b"\n" + body[-2:]) != "refused"
        assert same(body[:-4] + b"\n" + body[-4:]) == "refused"


@pytest.mark.parametrize(
    "text",
    [b'"%b"', b'"a":"%b"', b'"a":["%b":1]', b'"a":{"%b":1}', b'"a":"\\u00%b"', b'"a":"\\%b"',
     b'"a":"%b\\"', b'"a":"\\\\%b"', b'"a":"\\\\"%b"', b'"a":%b', b'"a":1,"%b":2,"%b":3',
     b'"a":"%b","a":"b%b"', b'"n":1e999,"a":"%b"', b'"a":"%b"\\'],
)  # fmt: skip
@pytest.mark.parametrize(
    "run", [b"a" * 9000, b"0" * 9000, "é".encode() * 4500, b"a" * 4500 + b"\xff" + b"a" * 4500]
)
def test_stretches_in_odd_places(text: bytes, run: bytes) -> None:
    same(b"{" + text.replace(b"%b", run) + b"}")


@settings(max_examples=100)
@given(st.binary(max_size=60), st.binary(max_size=60), st.integers(0, 40))
def test_any_bytes_around_a_stretch(before: bytes, after: bytes, shift: int) -> None:
    for quote in (b"", b'"'):
        same(b'{"a":"' + before + b"x" * (9000 + shift) + after + quote + b',"b":1}')
        same(b'{"a":"' + b"x" * (9000 + shift) + b'"' + before + quote + b'"}')


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 72_000, (prompt.MOST_CHUNKS + 2) * prompt.CHUNK])
def test_chains_are_those_of_the_reference(size: int) -> None:
    data = random.Random(size).randbytes(size)
    for seed in (0, 7, (1 << 64) - 1, prompt.PLAIN_SPACE):
        for text in (data, memoryview(data)[3:]):
            assert reading.chain(text, seed) == prompt.chain(memoryview(text), seed)
