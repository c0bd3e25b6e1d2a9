"""JSON Lines: what is a row, what is refused, and with which words."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcserve.batch.inputs import lines
from hpcserve.batch.inputs.files import open_inputs
from hpcserve.errors import ConfigError

from .conftest import Write, checked, columns, json_lines, refusal

ROWS = [{"q": "één", "n": 1}, {"q": "two\nlines", "n": None}, {"q": "", "n": 2.5}]


def test_rows_are_numbered_from_0_and_placed_by_lines_from_1(write: Write) -> None:
    write("data.jsonl", json_lines(ROWS))
    rows = checked("data.jsonl")
    assert [row.number for row in rows] == [0, 1, 2]
    assert [row.place for row in rows] == ["data.jsonl:1", "data.jsonl:2", "data.jsonl:3"]
    assert [row.columns for row in rows] == ROWS


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)]
)
@pytest.mark.parametrize("name", ["data.jsonl", "data.ndjson", "data.JSON"])
def test_compression_makes_no_difference(write: Write, name: str, suffix: str, pack: Any) -> None:
    write(name + suffix, pack(json_lines(ROWS).encode()))
    inputs = open_inputs([name + suffix])
    assert columns(inputs) == ROWS
    assert inputs.files[0].format == "jsonl"
    assert inputs.columns is inputs.schema is None


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)]
)
def test_all_members_of_a_compressed_file_are_read(write: Write, suffix: str, pack: Any) -> None:
    """As `cat a.gz b.gz` and `pzstd` make them."""
    write(f"data.jsonl{suffix}", b"".join(pack(json_lines([row]).encode()) for row in ROWS))
    assert columns(open_inputs([f"data.jsonl{suffix}"])) == ROWS


def test_blank_lines_a_byte_order_mark_and_crlf_are_no_rows(write: Write) -> None:
    write("data.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert [(row.number, row.place, row.columns) for row in checked("data.jsonl")] == [
        (0, "data.jsonl:1", {"a": 1}),
        (1, "data.jsonl:4", {"a": 2}),
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=25)
@given(rows=st.lists(st.dictionaries(st.text(), JSON), min_size=1, max_size=5), packed=st.booleans())
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: Any, packed: bool) -> None:
    path = tmp_path_factory.mktemp("rows") / ("data.jsonl.zst" if packed else "data.jsonl")
    content = json_lines(rows).encode()
    path.write_bytes(zstandard.compress(content) if packed else content)
    assert columns(open_inputs([str(path)])) == rows


GOOD = '{"a": 1}\n'


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (
            GOOD + '{"a": 1,}\n' + GOOD,
            "data.jsonl:2: broken JSON: Expecting property name enclosed in double quotes (column 9)",
            "Correct the line.",
        ),
        (
            GOOD + '{"a": "cut of',
            "data.jsonl:2: broken JSON: Unterminated string starting at (column 7)",
            "The file ends with this line; was it cut off?",
        ),
        (
            GOOD + '{"a": NaN}\n',
            "data.jsonl:2: broken JSON: NaN is no JSON value",
            "Write null for numbers that are not there.",
        ),
        (
            GOOD + '{"a": 1e999}\n',
            "data.jsonl:2: broken JSON: a number is too large for JSON readers",
            "Correct the line.",
        ),
        (
            GOOD + '{"a": "\\ud83d"}\n',
            "data.jsonl:2: broken JSON: a text has half of a surrogate pair (\\ud800 to \\udfff), "
            "which UTF-8 can't hold",
            "Correct the line.",
        ),
        (
            GOOD + '{"a": ' + "[" * 100_000 + "\n",
            "data.jsonl:2: broken JSON: nested too deep",
            "Correct the line.",
        ),
        (
            '[\n{"a": 1}\n]\n',
            "data.jsonl:1: a JSON array over several lines, not JSON Lines",
            "Make lines of it with `jq -c '.[]'`.",
        ),
        (
            GOOD + "[1, 2]\n",
            "data.jsonl:2: the line must be a JSON object, not an array",
            "Write one object a line; `jq -c '.[]'` makes lines of an array.",
        ),
        (
            GOOD + '"text"\n',
            "data.jsonl:2: the line must be a JSON object, not a text",
            "Write one object a line; `jq -c '.[]'` makes lines of an array.",
        ),
        (
            GOOD + "null\n",
            "data.jsonl:2: the line must be a JSON object, not null",
            "Write one object a line; `jq -c '.[]'` makes lines of an array.",
        ),
        (
            GOOD + "false\n",
            "data.jsonl:2: the line must be a JSON object, not false",
            "Write one object a line; `jq -c '.[]'` makes lines of an array.",
        ),
        (
            GOOD + "3\n",
            "data.jsonl:2: the line must be a JSON object, not a number",
            "Write one object a line; `jq -c '.[]'` makes lines of an array.",
        ),
        (
            GOOD.encode() + b'{"a": "\xe9"}\n',
            "data.jsonl:2: invalid UTF-8 in byte 8 of the line",
            "Convert the file, for example with `iconv -f ISO-8859-1 -t UTF-8`.",
        ),
        (
            GOOD.encode("utf-16"),
            "data.jsonl: UTF-16, not UTF-8",
            "Convert the file with `iconv -f UTF-16 -t UTF-8`.",
        ),
        ("\n \n", "data.jsonl: the file has no rows", "Leave it out, or make it again."),
        ("", "data.jsonl: the file is empty", "Leave it out, or make it again."),
    ],
)
def test_a_bad_line_is_one_error_with_its_number(
    write: Write, content: bytes | str, message: str, hint: str
) -> None:
    write("data.jsonl", content)
    assert refusal("data.jsonl") == (message, hint)


def test_a_line_without_end_does_not_fill_the_memory(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE", 1 << 20)
    write("data.jsonl", GOOD + json.dumps({"a": "x" * (1 << 20)}) + "\n")
    message, hint = refusal("data.jsonl")
    assert message == "data.jsonl:2: the line is longer than 1 MiB"
    assert hint == "Write one row a line, and large files (images) as links instead."


MANY = json_lines({"a": number} for number in range(5000)).encode()


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)]
)
@pytest.mark.parametrize("missing", [1, 9, 300])
def test_a_compressed_file_that_was_cut_off_is_no_shorter_file(
    write: Write, suffix: str, pack: Any, missing: int
) -> None:
    write(f"data.jsonl{suffix}", pack(MANY)[:-missing])
    message, hint = refusal(f"data.jsonl{suffix}")
    start, _, end = message.partition(" after line ")
    assert start == f"data.jsonl{suffix}: cut off"
    assert end.partition(": ")[2] == "the compressed data has no end"
    assert hint == "Copy or make the file again."


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("data.jsonl.gz", "Not a gzipped file (b'{\"')"),
        ("data.jsonl.zst", "zstd decompressor error: Unknown frame descriptor"),
    ],
)
def test_a_suffix_that_lies_is_told(write: Write, name: str, cause: str) -> None:
    write(name, GOOD)
    assert refusal(name) == (
        f"{name}: damaged after line 0: {cause}",
        "Copy or make the file again; is it what its suffix says?",
    )


def test_a_wrong_checksum_in_a_gz_file_is_told(write: Write) -> None:
    packed = bytearray(gzip.compress(MANY))
    packed[-8] ^= 0xFF
    write("data.jsonl.gz", bytes(packed))
    assert refusal("data.jsonl.gz")[0].startswith("data.jsonl.gz: damaged after line 5000: CRC check failed")


def test_a_file_that_can_not_be_read_any_more_is_told(write: Write) -> None:
    path = write("data.jsonl", GOOD)
    inputs = open_inputs(["data.jsonl"])
    path.unlink()
    with pytest.raises(ConfigError) as error:
        list(inputs.rows())
    assert error.value.message == "data.jsonl: can't be read: No such file or directory"
    assert error.value.hint == "Check the path, its owner and its permissions."
