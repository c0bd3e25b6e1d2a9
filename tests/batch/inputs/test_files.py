"""Which files are read, in which order, and what is known of them."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from hpcserve.batch.inputs import custom_ids
from hpcserve.batch.inputs.custom_ids import CustomIds, Duplicate, first_duplicate
from hpcserve.batch.inputs.files import open_inputs
from hpcserve.errors import ConfigError

from .conftest import Write, arrow_file, checked, columns, json_lines, refusal

LINE = '{"a": 1}\n'
ALLOWED = (
    "allowed: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .pq, .arrow, .feather, .ipc; "
    "those of text also with .gz or .zst"
)


def request(name: object = "1", **members: object) -> dict[str, object]:
    line = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": {}}
    return {key: value for key, value in (line | members).items() if value is not ...}


# Names


def test_patterns_come_in_their_order_and_what_they_match_is_sorted(write: Write) -> None:
    for name in ("b/2.jsonl", "b/10.jsonl", "a/x/1.jsonl", "a/1.jsonl", "c.jsonl"):
        write(name, json_lines([{"name": name}]))
    inputs = open_inputs(["c.jsonl", "b/*.jsonl", "a/**/*.jsonl"])
    names = ["c.jsonl", "b/10.jsonl", "b/2.jsonl", "a/1.jsonl", "a/x/1.jsonl"]
    assert [row["name"] for row in columns(inputs)] == names
    assert [file.path for file in inputs.files] == [os.path.abspath(name) for name in names]


def test_a_path_that_exists_is_no_pattern(write: Write) -> None:
    write("data[1].jsonl", LINE)
    assert len(checked("data[1].jsonl")) == 1


def test_the_home_directory_is_found_in_quotes(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("home/data.jsonl", LINE)
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    assert len(checked("~/*.jsonl")) == 1


def test_a_file_that_is_not_there_is_told(write: Write) -> None:
    write("sub/data.jsonl", LINE)
    assert refusal("sub/dta.jsonl") == (
        "sub/dta.jsonl: there is no such file or directory",
        "Did you mean 'sub/data.jsonl'?",
    )
    assert refusal("elsewhere/x.csv") == (
        "elsewhere/x.csv: there is no such file or directory",
        "Check the path.",
    )


def test_a_link_to_nothing_is_told() -> None:
    Path("data.jsonl").symlink_to("nowhere")
    assert refusal("data.jsonl")[0] == "data.jsonl: can't be read: No such file or directory"


def test_a_pattern_that_matches_nothing_is_told(write: Write) -> None:
    write("sub/data.jsonl", LINE)
    assert refusal("sub/*.parquet") == ("no file matches 'sub/*.parquet'", "In 'sub' there are: data.jsonl.")
    assert refusal("sup/*/x") == ("no file matches 'sup/*/x'", "'sup' is empty, or no directory.")


def test_no_names_at_all_are_told() -> None:
    assert refusal() == ("no input files", "Name files, for example data.jsonl or 'data/*.parquet'.")


def test_a_file_named_twice_is_told(write: Write) -> None:
    write("a.jsonl", LINE)
    assert refusal("*.jsonl", "./a.jsonl") == (
        "./a.jsonl: named twice, by '*.jsonl' and by './a.jsonl'",
        "Name it once; more answers to a row are more samples.",
    )


def test_addresses_are_told() -> None:
    assert refusal("hf://datasets/org/name") == (
        "hf://datasets/org/name: files are not fetched from the network",
        "Download it first; compute nodes often can't.",
    )


def test_what_can_be_read_only_once_is_told() -> None:
    os.mkfifo("data.jsonl")
    assert refusal("data.jsonl") == (
        "data.jsonl: not a regular file",
        "Write it to a file: it is read more than once.",
    )


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("data.jsonnl", f"the suffix .jsonnl is unknown; {ALLOWED}", "Did you mean '.jsonl'?"),
        ("data.csb.gz", f"the suffix .csb is unknown; {ALLOWED}", "Did you mean '.csv'?"),
        ("data.jsonl.gzz", f"the suffix .gzz is unknown; {ALLOWED}", "Did you mean '.gz'?"),
        ("data.docx", f"the suffix .docx is unknown; {ALLOWED}", "Convert the file to one of these formats."),
        (
            "data",
            f"no suffix tells the format; {ALLOWED}",
            "Rename the file, or make a link to it that has the suffix.",
        ),
        (
            "data.parquet.gz",
            ".parquet files are read in pieces, so they can't be inside .gz",
            "Unpack the file; Parquet and Arrow can be compressed inside.",
        ),
    ],
)
def test_a_suffix_that_is_not_known_is_told(write: Write, name: str, message: str, hint: str) -> None:
    write(name, LINE)
    assert refusal(name) == (f"{name}: {message}", hint)


def test_files_of_two_kinds_are_told(write: Write) -> None:
    write("a.jsonl", LINE)
    write("b.csv", "a\n1\n")
    assert refusal("a.jsonl", "b.csv") == (
        "b.csv: CSV, but a.jsonl is JSON Lines: the files of one run must be of one kind",
        "Convert them, or run them apart.",
    )


# What is known of them


def test_the_digest_is_that_of_the_bytes_on_disk(write: Write) -> None:
    path = write("data.csv", "a\n" + "x\n" * 1_000_000)
    (file,) = open_inputs(["data.csv"]).files
    assert file.digest == xxhash.xxh3_128_hexdigest(path.read_bytes())
    assert (file.size, file.mtime_ns, file.rows) == (2_000_002, path.stat().st_mtime_ns, None)


def test_rows_are_counted_when_all_were_checked(write: Write) -> None:
    write("a.jsonl", LINE * 3)
    write("b.jsonl", LINE * 2)
    inputs = open_inputs(["?.jsonl"])
    rows = inputs.checked_rows()
    next(rows)
    assert [file.rows for file in inputs.files] == [None, None]
    assert len(list(rows)) == 4
    assert [file.rows for file in inputs.files] == [3, 2]


def test_a_file_that_is_known_is_not_read_again_for_its_digest(write: Write) -> None:
    path = write("a.jsonl", LINE)
    write("b.jsonl", LINE)
    known = [replace(file, digest="known", rows=7) for file in open_inputs(["?.jsonl"]).files]
    assert open_inputs(["?.jsonl"], known=known).files == tuple(known)
    path.write_text(LINE * 2)
    first, second = open_inputs(["?.jsonl"], known=known).files
    assert first.digest == xxhash.xxh3_128_hexdigest(path.read_bytes())
    assert first.rows is None
    assert second == known[1]


def test_a_file_that_is_still_written_is_told(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("data.jsonl", LINE)

    class Slow:
        """A digest whose file has grown before it is made."""

        def update(self, piece: bytes) -> None:
            with path.open("a") as file:
                file.write(LINE if path.stat().st_size == len(LINE) else "")

    monkeypatch.setattr("hpcserve.batch.inputs.files.xxhash.xxh3_128", Slow)
    assert refusal("data.jsonl") == (
        "data.jsonl: the file was changed while it was read",
        "Wait until it is written.",
    )


def test_rows_can_be_read_again_and_several_times_at_once(write: Write) -> None:
    write("data.jsonl", json_lines({"a": number} for number in range(10)))
    inputs = open_inputs(["data.jsonl"])
    pairs = list(zip(inputs.rows(), inputs.rows(), strict=True))
    assert len(pairs) == 10
    assert all(one == other for one, other in pairs)


# OpenAI lines


def test_openai_lines_are_known_by_their_members(write: Write) -> None:
    write("data.jsonl", json_lines([request("a"), request("b")]))
    inputs = open_inputs(["data.jsonl"])
    assert inputs.kind == "openai"
    assert [row.columns["custom_id"] for row in inputs.checked_rows()] == ["a", "b"]


def test_columns_that_only_sound_alike_make_no_openai_line(write: Write) -> None:
    write("data.jsonl", json_lines([{"url": "https://example.org", "body": "a scraped page", "title": "x"}]))
    assert open_inputs(["data.jsonl"]).kind == "rows"


OPENAI_HINT = "Such a line has custom_id, method, url and body. Run requests and plain rows apart."


def test_openai_and_plain_lines_do_not_mix(write: Write) -> None:
    write("a.jsonl", json_lines([request("a"), {"q": 1}]))
    write("b.jsonl", json_lines([{"q": 1}, request("a")]))
    assert refusal("a.jsonl") == ("a.jsonl:2: no OpenAI batch line, but a.jsonl:1 is one", OPENAI_HINT)
    assert refusal("b.jsonl") == ("b.jsonl:2: an OpenAI batch line, but b.jsonl:1 is none", OPENAI_HINT)
    with pytest.raises(ConfigError) as error:  # before anything is read through
        open_inputs(["a.jsonl", "b.jsonl"])
    assert error.value.message == "b.jsonl:1: no OpenAI batch line, but a.jsonl:1 is one"


ID_HINT = "Name each line; the answer has the same name."


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (..., "custom_id is missing"),
        ("", "custom_id must be a text that is not empty"),
        (7, "custom_id must be a text that is not empty"),
        (None, "custom_id must be a text that is not empty"),
    ],
)
def test_a_line_without_custom_id_is_told(write: Write, value: object, message: str) -> None:
    write("data.jsonl", json_lines([request("a"), request(value)]))
    assert refusal("data.jsonl") == (f"data.jsonl:2: {message}", ID_HINT)


def test_a_custom_id_that_is_there_twice_is_told_with_both_places(write: Write) -> None:
    write("a.jsonl", json_lines([request("1"), request("2"), request("3")]))
    write("b.jsonl", json_lines([request("4"), request("2"), request("1")]))
    assert refusal("a.jsonl", "b.jsonl") == (
        "b.jsonl:2: custom_id '2' is that of a.jsonl:2",
        "Answers are found by custom_id, so each must be there once.",
    )


def test_ids_are_compared_and_not_only_their_hashes(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CustomIds, "hash", staticmethod(len))
    monkeypatch.setattr(custom_ids, "SUSPECTS", 1)
    write("data.jsonl", json_lines([request(name) for name in ("a", "bb", "c", "dd", "eee", "fff")]))
    assert len(checked("data.jsonl")) == 6
    write("data.jsonl", json_lines([request(name) for name in ("a", "bb", "c", "dd", "eee", "dd")]))
    assert refusal("data.jsonl")[0] == "data.jsonl:6: custom_id 'dd' is that of data.jsonl:4"


@given(ids=st.lists(st.sampled_from("abcdefgh"), max_size=8), bits=st.integers(0, 3))
def test_the_first_duplicate_is_found_however_often_hashes_meet(ids: list[str], bits: int) -> None:
    expected = next(
        (Duplicate(name, row, ids.index(name)) for row, name in enumerate(ids) if name in ids[:row]), None
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CustomIds, "hash", staticmethod(lambda name: ord(name) >> bits))
        kept = CustomIds()
        for name in ids:
            kept.add(name)
        found = (first_duplicate(ids, suspects) for suspects in kept.suspects())
        assert next((duplicate for duplicate in found if duplicate), None) == expected


def test_the_ids_of_many_rows_take_32_bytes_each() -> None:
    rows = 300_000
    ids = CustomIds()
    tracemalloc.start()
    for row in range(rows):
        ids.add(f"request-{row}")
    assert list(ids.suspects()) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.dtype(np.uint64).itemsize * rows < peak < 33 * rows


@pytest.mark.parametrize("name", ["data.jsonl", "data.arrow"])
def test_many_rows_are_read_in_little_memory(name: str) -> None:
    text = "word " * 60
    if name == "data.jsonl":
        with open(name, "w") as file:
            file.writelines(f'{{"id": {row}, "text": "{text}"}}\n' for row in range(300_000))
    else:  # all in one batch, as polars writes it
        arrow_file(Path(name), [pa.RecordBatch.from_pydict({"text": [text] * 300_000})])
    # In a process of its own, and by /proc: getrusage counts the process that started it, too.
    code = (
        "import re, sys, pyarrow\n"
        "from hpcserve.batch.inputs.files import open_inputs\n"
        "def most(): return int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "inputs = open_inputs([sys.argv[1]])\n"
        "before = most()\n"
        "assert sum(1 for _ in inputs.checked_rows()) == 300_000\n"
        "print(most() - before)\n"
    )
    command = [sys.executable, "-c", code, name]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 30 << 10  # KiB, of a file of about 90 MB
