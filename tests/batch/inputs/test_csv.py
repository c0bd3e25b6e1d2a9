"""CSV and tabs: a header, values as text, and a row of the wrong length is never filled up."""

from __future__ import annotations

import csv
import gzip
import io

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcserve.batch.inputs import lines
from hpcserve.batch.inputs.files import open_inputs

from .conftest import Write, checked, columns, refusal


def test_values_are_text_as_written(write: Write) -> None:
    write("data.csv", 'id,text\n007,"a, ""b""\nc"\n\n8,\n')
    rows = checked("data.csv")
    assert [row.columns for row in rows] == [{"id": "007", "text": 'a, "b"\nc'}, {"id": "8", "text": ""}]
    assert [row.place for row in rows] == ["data.csv:2", "data.csv:5"]
    inputs = open_inputs(["data.csv"])
    assert inputs.columns == ("id", "text")
    assert inputs.schema is None


def test_tabs_and_compression(write: Write) -> None:
    write("data.tsv.gz", gzip.compress(b"a\tb\n1,5\t2\n"))
    write("data.csv.zst", zstandard.compress(b"\xef\xbb\xbfa,b\r\n3,4\r\n"))
    assert columns(open_inputs(["data.tsv.gz", "data.csv.zst"])) == [
        {"a": "1,5", "b": "2"},
        {"a": "3", "b": "4"},
    ]


def test_fields_may_be_longer_than_what_pythons_csv_allows(write: Write) -> None:
    write("data.csv", f"a\n{'x' * 1_000_000}\n")
    assert [len(row["a"]) for row in columns(open_inputs(["data.csv"]))] == [1_000_000]


@settings(max_examples=50)
@given(
    rows=st.lists(
        st.tuples(*2 * (st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r")),)),
        min_size=1,
        max_size=5,
    )
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([("a", "b"), *rows])
    path = tmp_path_factory.mktemp("rows") / "data.csv"
    path.write_bytes(buffer.getvalue().encode())
    assert [tuple(row.values()) for row in columns(open_inputs([str(path)]))] == rows


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        ("", "data.csv: the file is empty", "Leave it out, or make it again."),
        ("\n\n", "data.csv: no header", "Name the columns in the first line."),
        ("a,b\n", "data.csv: the file has no rows", "Leave it out, or make it again."),
        ("a,b,a\n1,2,3\n", "data.csv: the header has the column 'a' twice", "Rename one of them."),
        (
            "a,,c\n1,2,3\n",
            "data.csv: the header has no name for column 2 of 3",
            "Name all columns in the first line.",
        ),
        (
            "a,b\n1,2\n1,2,3\n",
            "data.csv:3: the row has 3 fields, the header 2 columns",
            "Put fields with commas, quotes or line breaks in quotes.",
        ),
        (
            'a,b\n"1\n1",2\n1\n',
            "data.csv:4: the row has 1 field, the header 2 columns",
            "Write empty fields, too.",
        ),
        (
            'a,b\n1,2\n"1,2\n3,4\n',
            "data.csv:3: the row has a quote that is not closed",
            "Close it, or write a quote inside of quotes twice.",
        ),
        (
            'a,b\n"x"y,2\n',
            "data.csv:2: broken CSV: ',' expected after '\"'",
            "Put fields with quotes in quotes, and write each quote inside twice.",
        ),
        (
            "a,b\r1,2\r",
            "data.csv:1: lines end with a carriage return alone",
            "Convert the file, for example with `mac2unix`.",
        ),
        (
            b"a,b\n1,2\nr\xe9sum\xe9,2\n",
            "data.csv:3: invalid UTF-8 in byte 2 of the line",
            "Convert the file, for example with `iconv -f ISO-8859-1 -t UTF-8`.",
        ),
    ],
)
def test_a_bad_row_is_one_error_with_its_line(
    write: Write, content: bytes | str, message: str, hint: str
) -> None:
    write("data.csv", content)
    assert refusal("data.csv") == (message, hint)


def test_a_quote_that_swallows_the_file_does_not_fill_the_memory(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpcserve.batch.inputs.csv.MAX_LINE", 1000)
    write("data.csv", 'a,b\n"1,2\n' + "3,4\n" * 1000)
    assert refusal("data.csv")[0] == "data.csv:2: the row has a quote that is not closed"
    assert lines.MAX_LINE > 1000


def test_the_columns_of_all_files_must_be_the_same(write: Write) -> None:
    write("a.csv", "question,answer\n1,2\n")
    write("b.csv", "answer,question\n3,4\n")
    assert columns(open_inputs(["a.csv", "b.csv"]))[1] == {"answer": "3", "question": "4"}
    write("b.csv", "questoin,answer\n3,4\n")
    assert refusal("a.csv", "b.csv") == (
        "b.csv: the column 'questoin' is not in a.csv",
        "Did you mean 'question'?",
    )
    write("b.csv", "answer\n4\n")
    assert refusal("a.csv", "b.csv") == (
        "b.csv: the column 'question' of a.csv is missing",
        "All files of one run must have the same columns.",
    )
