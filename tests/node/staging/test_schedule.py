"""Every node that lacks a file gets each of its bytes once, and the shared file system gives each once."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as some

from hpcserve.node.staging.schedule import schedule
from hpcserve.node.staging.source import SourceFile

SIZES = some.lists(some.integers(0, 50), min_size=1, max_size=6)


@given(SIZES, some.data())
def test_all_bytes_come_to_all_that_lack_them_once(sizes: list[int], data: some.DataObject) -> None:
    files = [SourceFile(name=str(index), size=size, mtime_ns=0) for index, size in enumerate(sizes)]
    indices = some.frozensets(some.integers(0, len(files) - 1))
    held = data.draw(some.lists(indices, min_size=1, max_size=6))
    size = len(held)
    chunks = schedule(files, held, chunk=7)
    read: Counter[int] = Counter()
    for index, file in enumerate(files):
        mine = [chunk for chunk in chunks if chunk.file == index]
        lacking = [place for place in range(size) if index not in held[place]]
        covered = [at for chunk in mine for at in range(chunk.offset, chunk.offset + chunk.length)]
        assert covered == (list(range(file.size)) if lacking else [])
        for chunk in mine:
            got = [place for place in range(size) if chunk.comes_to(place, size)]
            assert chunk.owner not in got
            assert set(lacking) <= {*got, chunk.owner}
            # A holder reads its own disk; without one, a node that lacks it reads the shared file system.
            assert (index in held[chunk.owner]) == (len(lacking) < size)
            if len(lacking) == size:
                read[chunk.owner] += chunk.length
            # What comes to a node was passed on by the one before it.
            for place in got:
                assert chunk.goes_on_from((place - 1) % size, size)
            sent = [place for place in range(size) if chunk.goes_on_from(place, size)]
            assert len(sent) == len(got) == chunk.hops
    if read:
        total = sum(read.values())
        assert all(abs(read[place] - total / size) < 14 for place in range(size))
