"""Journals: what is whole is read, what is torn is cut, and everybody finds the same."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcserve.batch import disk
from hpcserve.batch import journal as journal_module
from hpcserve.batch.journal import (
    RECORD,
    Entry,
    JournalReader,
    JournalWriter,
    Kind,
    Lines,
    data_path,
    index_path,
    set_aside,
)
from hpcserve.batch.tally import Standing, Tally
from hpcserve.errors import StorageError


def answer(item: int, text: str = "", kind: Kind = Kind.ANSWER) -> Entry:
    body = msgspec.Raw(msgspec.json.encode({"text": text or f"answer {item}"}))
    return Entry(item=item, kind=kind, attempts=1, status=200, body=body, output_tokens=item % 7)


def write(directory: Path, entries: list[Entry]) -> JournalWriter:
    journal = JournalWriter(directory)
    for entry in entries:
        journal.append(entry)
    journal.close()
    return journal


def standing_texts(directory: Path, items: int) -> dict[int, str]:
    """Item -> the text of the result that stands."""
    standing, lines = Standing(directory, items), Lines(directory)
    found = {}
    for item in range(items):
        if standing.epoch[item]:
            place = (int(standing.epoch[item]), int(standing.offset[item]), int(standing.length[item]))
            entry = lines.read(*place)
            assert entry is not None and entry.item == item
            found[item] = msgspec.json.decode(entry.body)["text"]
    lines.close()
    return found


def test_what_was_written_is_read_again(tmp_path):
    journal = write(tmp_path, [answer(n, f"été\n{n}") for n in range(50)])
    assert journal.epoch == 1
    [records] = JournalReader(tmp_path, 1).more()
    assert records["item"].tolist() == list(range(50))
    assert records["output"].tolist() == [n % 7 for n in range(50)]
    assert standing_texts(tmp_path, 60) == {n: f"été\n{n}" for n in range(50)}


def test_an_engine_that_writes_json_over_several_lines_fits_in_one(tmp_path):
    write(tmp_path, [Entry(item=0, kind=0, attempts=1, body=msgspec.Raw(b'{\n "text": "a"\n}'))])
    assert standing_texts(tmp_path, 1) == {0: "a"}
    assert data_path(tmp_path, 1).read_bytes().count(b"\n") == 1


def test_writers_never_share_a_journal(tmp_path):
    writers = [JournalWriter(tmp_path) for _ in range(5)]
    assert [writer.epoch for writer in writers] == [1, 2, 3, 4, 5]
    for writer in writers:
        writer.close()


def test_a_reader_goes_on_where_it_stopped(tmp_path):
    journal, reader = JournalWriter(tmp_path), JournalReader(tmp_path, 1)
    assert not [*reader.more()]
    for item in range(10):
        journal.append(answer(item))
        assert [records["item"].tolist() for records in reader.more()] == [[item]]
    assert len(reader.lost_lines()) == 0
    journal.close()


def test_a_long_journal_is_read_in_pieces_and_says_the_same(tmp_path, monkeypatch):
    dice = random.Random(1)
    for _ in range(3):
        write(
            tmp_path,
            [Entry(item=dice.randrange(30), kind=dice.randrange(3), attempts=n, body=msgspec.Raw(b"{}"))
             for n in range(60)],
        )  # fmt: skip

    def read() -> list[list[int]]:
        standing = Standing(tmp_path, 30)
        columns = (standing.epoch, standing.offset, standing.length, standing.is_error)
        return [column.tolist() for column in columns] + [[standing.results]]

    whole = read()
    monkeypatch.setattr(journal_module, "_AT_ONCE", 7)
    assert read() == whole
    assert [len(records) for records in JournalReader(tmp_path, 1).more()] == [7] * 8 + [4]


@settings(max_examples=60)
@given(st.data())
def test_a_cut_at_any_byte_leaves_whole_results_and_no_other(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("journals")
    write(directory, [answer(n) for n in range(6)])
    lines, index = data_path(directory, 1), index_path(directory, 1)
    cut_lines = data.draw(st.integers(0, lines.stat().st_size))
    cut_index = data.draw(st.integers(0, index.stat().st_size))
    ends = np.cumsum([len(line) for line in lines.read_bytes().splitlines(keepends=True)])
    os.truncate(lines, cut_lines)
    os.truncate(index, cut_index)
    # Every line that is whole counts, whether the index has it or not.
    whole = int(np.count_nonzero(ends <= cut_lines))
    tally = Tally(directory, 6)
    tally.look()
    assert tally.done.tolist() == [n < whole for n in range(6)]
    assert standing_texts(directory, 6) == {n: f"answer {n}" for n in range(whole)}


@settings(max_examples=60)
@given(st.integers(0, 5), st.integers(0, 255), st.integers(1, 255))
def test_a_flipped_byte_in_the_index_costs_nothing_that_is_in_the_data(tmp_path_factory, record, at, flip):
    directory = tmp_path_factory.mktemp("journals")
    write(directory, [answer(n) for n in range(6)])
    index = index_path(directory, 1)
    data = bytearray(index.read_bytes())
    data[(record * RECORD.itemsize + at % RECORD.itemsize)] ^= flip
    index.write_bytes(bytes(data))
    assert standing_texts(directory, 6) == {n: f"answer {n}" for n in range(6)}


def test_zeros_at_the_end_as_after_a_power_cut_are_cut(tmp_path):
    write(tmp_path, [answer(0)])
    for path in (data_path(tmp_path, 1), index_path(tmp_path, 1)):
        with path.open("ab") as file:
            file.write(bytes(3 * RECORD.itemsize))
    tally = Tally(tmp_path, 3)
    tally.look()
    assert tally.done.tolist() == [True, False, False]


def test_the_first_answer_stands_and_an_error_gives_way_to_one(tmp_path):
    write(tmp_path, [answer(0, "first"), answer(1, "too long", Kind.ERROR), answer(2, "bad", Kind.ERROR)])
    write(tmp_path, [answer(0, "second"), answer(1, "after all"), answer(2, "worse", Kind.ERROR)])
    write(tmp_path, [answer(1, "again"), answer(0, "an error", Kind.ERROR)])
    assert standing_texts(tmp_path, 3) == {0: "first", 1: "after all", 2: "worse"}
    assert Standing(tmp_path, 3).results == 8


@settings(max_examples=80)
@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(list(Kind))), max_size=12), max_size=5))
def test_the_standing_result_is_the_formula_whatever_the_journals_hold(tmp_path_factory, journals):
    directory = tmp_path_factory.mktemp("journals")
    expected: dict[int, str] = {}
    errors: dict[int, str] = {}
    for number, entries in enumerate(journals):
        named = [(item, kind, f"{number}.{at}") for at, (item, kind) in enumerate(entries)]
        write(directory, [answer(item, text, kind) for item, kind, text in named])
        for item, kind, text in named:
            if kind is Kind.ANSWER:
                expected.setdefault(item, text)
            elif kind is Kind.ERROR:
                errors[item] = text
    assert standing_texts(directory, 10) == errors | expected


def test_deaths_are_counted_over_jobs_and_are_no_results(tmp_path):
    write(tmp_path, [Entry(item=3, kind=Kind.DEATH, attempts=0)])
    write(tmp_path, [Entry(item=3, kind=Kind.DEATH, attempts=0), answer(1)])
    tally = Tally(tmp_path, 5)
    tally.look()
    assert tally.deaths == {3: 2}
    assert tally.left == 4


def test_a_line_set_aside_counts_no_more(tmp_path):
    write(tmp_path, [answer(0, "damaged"), answer(1)])
    write(tmp_path, [answer(0, "good")])
    set_aside(tmp_path, 1, [0])
    assert standing_texts(tmp_path, 2) == {0: "good", 1: "answer 1"}


def test_a_journal_of_another_batch_is_refused(tmp_path):
    write(tmp_path, [answer(7)])
    with pytest.raises(StorageError, match="about another batch"):
        Tally(tmp_path, 5).look()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_failing_disk_stops_the_writer_for_good(tmp_path, monkeypatch, number, call):
    journal = JournalWriter(tmp_path)
    journal.append(answer(0))
    real = getattr(os, call)
    left = random.Random(number).randrange(3)

    def fails(handle, *args):
        nonlocal left
        left -= 1
        if left < 0:
            if call == "write":
                real(handle, bytes(args[0])[: len(args[0]) // 2])  # half a line, as a full disk leaves it
            raise OSError(number, os.strerror(number))
        return real(handle, *args)

    monkeypatch.setattr(disk.os, call, fails)
    with pytest.raises(StorageError) as told:
        for item in range(1, 5):
            journal.append(answer(item))
            journal.sync()
    assert told.value.exit_code == 7
    assert os.strerror(number) in told.value.message
    assert "same command again" in (told.value.hint or "")
    monkeypatch.undo()
    with pytest.raises(StorageError):  # nothing may follow the torn line
        journal.append(answer(9))
    assert set(standing_texts(tmp_path, 10)) <= {0, 1, 2, 3}
