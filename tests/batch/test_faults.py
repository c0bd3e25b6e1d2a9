"""Every write, fsync, rename and link of a batch fails once, and is the last thing a process does once: after
each, the same work again gives the exact output."""

from __future__ import annotations

import errno
import json
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hpcserve.batch import disk
from hpcserve.batch.begin import BatchRequest, Model, begin
from hpcserve.batch.finish import finish, is_complete, settle
from hpcserve.batch.journal import Entry, Kind
from hpcserve.batch.layout import BatchDir
from hpcserve.batch.work import Work
from hpcserve.errors import StorageError

from .planted import member

ROWS = 23
COUNTED = ("open", "write", "fsync", "replace", "link", "utime")
KILLED = 137


class Faulty:
    """`os`, but the call number `at` among the counted ones does something else."""

    def __init__(self, at: int, fault: Callable[[Callable[..., Any], tuple[Any, ...]], Any]) -> None:
        self._at = at
        self._fault = fault
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in COUNTED:
            return real

        def call(*args: Any) -> Any:
            self.calls += 1
            return self._fault(real, args) if self.calls == self._at else real(*args)

        return call


def full(real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The disk is full in the middle of it."""
    half(real, args)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def dies(real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """kill -9 in the middle of it."""
    half(real, args)
    os._exit(KILLED)


def half(real: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if real is os.write:
        real(args[0], bytes(args[1])[: len(args[1]) // 2])


def work_through(directory: BatchDir) -> None:
    """What a driver does with its disk, without an endpoint."""
    if settle(directory):
        return
    work = Work(directory, member("a"))
    try:
        while work.tally.left:
            items = work.take()
            if items is None:
                assert work.claims.renew(work.tally.done)
                continue
            for request in work.requests(items):
                work.journal.append(entry(request.item))
                work.tally.mark(request.item, Kind.ANSWER)
                if request.item % 7 == 0:
                    work.journal.sync()
    finally:
        work.close()
    finish(directory)


def entry(item: int) -> Entry:
    """As if an engine had answered; every fifth with an error."""
    if item % 5 == 4:
        return Entry(item=item, kind=Kind.ERROR, attempts=1, status=400, error=("400", "too long"))
    body = {"choices": [{"text": f"answer {item}", "finish_reason": "stop"}], "usage": {"prompt_tokens": 1}}
    return Entry(
        item=item, kind=Kind.ANSWER, attempts=1, status=200, body=msgspec.Raw(json.dumps(body).encode())
    )


@pytest.fixture(params=["openai", "jsonl", "parquet"])
def planned(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], BatchDir]:
    """`planned(name)` is a fresh copy of one plan."""
    data = tmp_path / "data.jsonl"
    with data.open("w") as file:
        for row in range(ROWS):
            file.write(json.dumps({"text": f"row {row}", "label": row}) + "\n")
    asked = BatchRequest(
        inputs=[str(data)], output=tmp_path / "plan", prompt_column="text", format=request.param
    )
    begin(asked, Model(served_name="toy", path="org/toy", revision=None))

    def copy(name: str) -> BatchDir:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(tmp_path / "plan", tmp_path / name)
        return BatchDir(tmp_path / name)

    return copy


def outputs(directory: BatchDir) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(directory.out.iterdir())
        if path.is_file() and path.name.startswith(("output.", "errors."))
    }


def faults(planned: Callable[[str], BatchDir], fault: Any) -> Iterator[tuple[int, BatchDir, int]]:
    """For every counted call: its number, the directory after the fault there, and how the process ended."""
    at = 0
    while True:
        at += 1
        directory = planned("faulty")
        child = os.fork()
        if not child:
            status = 99
            try:
                disk.os = Faulty(at, fault)  # type: ignore[assignment]
                work_through(directory)
                status = 0
            except StorageError:
                status = StorageError.exit_code
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        status = os.waitstatus_to_exitcode(ended)
        yield at, directory, status
        if status == 0:
            return


@pytest.mark.parametrize("fault", [dies, full], ids=["killed", "disk full"])
def test_after_a_fault_at_any_call_the_same_work_again_gives_the_exact_output(planned, fault):
    whole = planned("whole")
    work_through(whole)
    expected = outputs(whole)
    assert expected
    seen = set()
    for at, directory, status in faults(planned, fault):
        seen.add(status)
        names = set(outputs(directory))
        assert all(outputs(directory)[name] == expected[name] for name in names), f"call {at}: not whole"
        work_through(directory)
        assert outputs(directory) == expected, f"after a fault at call {at}"
        leftovers = [path.name for path in directory.out.iterdir() if path.name != ".batch"]
        assert set(leftovers) <= {*expected, "report.json", "report.svg", "report.txt"}
        assert at < 2000
    assert seen <= {0, KILLED if fault is dies else 7}
    assert at > ROWS


def test_a_damaged_line_is_found_by_the_merge_and_its_row_done_again(planned):
    whole = planned("whole")
    work_through(whole)
    expected = outputs(whole)
    directory = planned("damaged")
    work = Work(directory, member("a"))
    while (items := work.take()) is not None:
        for request in work.requests(items):
            work.journal.append(entry(request.item))
    work.close()
    path = directory.journals / "000001.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x20
    path.write_bytes(bytes(data))
    from hpcserve.batch.merge import Unfinished

    with pytest.raises(Unfinished, match="1 results are missing"):
        finish(directory)
    assert outputs(directory) == {}
    work_through(directory)
    assert outputs(directory) == expected


def test_who_is_killed_while_clearing_up_leaves_the_rest_of_it_to_the_next(planned):
    directory = planned("whole")
    work_through(directory)
    expected = outputs(directory)
    directory.journals.mkdir()  # the last to go
    assert not is_complete(directory)
    assert settle(directory)
    assert is_complete(directory)
    assert outputs(directory) == expected
