"""Planned batches without an input, and an endpoint of stubs to carry them out on."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import msgspec
import numpy as np

from hpcserve.batch.driver import Driver, Limits
from hpcserve.batch.journal import Entry, Lines
from hpcserve.batch.layout import BatchDir
from hpcserve.batch.manifest import FORMAT, Asked, Manifest
from hpcserve.batch.members import Member, started
from hpcserve.batch.progress import Progress
from hpcserve.batch.prompts import Request
from hpcserve.batch.sending import Endpoint
from hpcserve.batch.spool import SpoolWriter
from hpcserve.batch.tally import Standing
from hpcserve.batch.work import Work
from tests.router.stubs import KEY, Bench

ASKED = Asked(
    model="toy", revision=None, template=None, system=None, prompt_column="prompt", messages_column=None,
    sampling={}, samples=1, seed=0, limit=None, sample=None,
)  # fmt: skip


def plant(out: Path, items: int, *, max_tokens: int = 4, prompt: str = "row {}") -> BatchDir:
    """A plan of `items` completions, in their order."""
    directory = BatchDir(out)
    directory.plan.mkdir(parents=True)
    spool = SpoolWriter(directory.plan)
    for item in range(items):
        body = {"model": "toy", "prompt": prompt.format(item), "max_tokens": max_tokens}
        spool.add(Request("/v1/completions", msgspec.json.encode(body), b"", max_tokens, None, None), 2)
    spool.close()
    np.arange(items, dtype="<u8").tofile(directory.plan / "order.bin")
    manifest = Manifest(
        format=FORMAT, version="0", created=0.0, kind="rows", files=(), asked=ASKED, output="openai",
        order="input", rows=items, items=items, prompt_tokens=2 * items, tokens_exact=False,
    )  # fmt: skip
    directory.manifest.write_bytes(msgspec.json.encode(manifest))
    return directory


def member(name: str = "a", *, alive: bool = True) -> Member:
    """This process, or one that is no more."""
    pid = os.getpid()
    return Member(name, os.uname().nodename, pid, (started(pid) or 0) if alive else 1, None, 0)


def endpoint(bench: Bench, path: Path, end_time: float | None = None) -> Endpoint:
    (path / "key").write_text(KEY)
    told = {
        "url": bench.url + "/v1",
        "served_name": "toy",
        "key_file": str(path / "key"),
        "end_time": end_time,
    }
    (path / "endpoint.json").write_text(json.dumps(told))
    return Endpoint(path / "endpoint.json")


def driver(work: Work, where: Endpoint, *, error_rate: float = 0.5) -> tuple[Driver, Progress, io.StringIO]:
    shown = io.StringIO()
    progress = Progress(shown)
    return Driver(work, where, progress, Limits(error_rate=error_rate)), progress, shown


def results(directory: BatchDir, items: int) -> dict[int, Entry]:
    """What stands, by item."""
    standing, lines = Standing(directory.journals, items), Lines(directory.journals)
    found = {}
    for item in np.flatnonzero(standing.epoch).tolist():
        place = (int(standing.epoch[item]), int(standing.offset[item]), int(standing.length[item]))
        entry = lines.read(*place)
        assert entry is not None and entry.item == item
        found[item] = entry
    lines.close()
    return found
