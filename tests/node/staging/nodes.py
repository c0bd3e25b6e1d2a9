"""Several nodes on this machine, each with a disk of its own, that stage one model together."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hpcserve.node.discovery.facts import ModelFact, RankFacts, Roster
from hpcserve.node.inputs import Inputs, load_inputs
from hpcserve.node.journal import open_journal
from hpcserve.node.staging.coordinator import Coordinator
from hpcserve.node.staging.worker import Worker
from hpcserve.rundir.layout import RunDir
from tests.node.runs import environment, events, make_plan, make_run


class OwnDisk(Worker):
    """A rank of another machine: the others can't see its directory, which has the same path there."""

    def _look(self) -> Mapping[str, Any]:
        found = super()._look()
        return found if "refused" in found else {"root": "/nvme", "identity": str(self._rank)}


def make_model(directory: Path, files: Mapping[str, bytes] | None = None) -> Path:
    """A model of a few MiB: config.json, three shards, an empty file and one in a folder."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    chosen = files or {
        "model-1.safetensors": os.urandom(5_000_003),
        "model-2.safetensors": os.urandom(3_000_000),
        "model-3.safetensors": os.urandom(1),
        "empty.txt": b"",
        "tokenizer/vocab.json": b"[]",
    }
    for name, content in chosen.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return directory


@dataclass
class Nodes:
    """`count` nodes with disks below `root`."""

    root: Path
    model: Path
    count: int = 3
    jobs: int = 0
    workers: list[Worker] = field(default_factory=list)

    def disk(self, rank: int) -> Path:
        path = self.root / f"disk{rank}"
        path.mkdir(exist_ok=True)
        return path

    def own(self, rank: int) -> Path:
        """The user's directory on a disk."""
        return self.disk(rank) / f"hpcserve-{os.getuid()}"

    def copies(self, rank: int) -> list[Path]:
        """Whole copies on a disk."""
        return sorted(self.own(rank).glob(f"*/{self.model.name}"))

    def inputs(self, run: RunDir, rank: int, **changes: Any) -> Inputs:
        inputs = load_inputs(run.path, environment(rank))
        site = replace(
            inputs.plan.site, storage=replace(inputs.plan.site.storage, node_local=str(self.disk(rank)))
        )
        return replace(inputs, plan=replace(inputs.plan, site=site, **changes))

    async def stage(self, kind: type[Worker] = OwnDisk, **changes: Any) -> tuple[str, RunDir]:
        """One job's staging: the path, and the run. Raises what ends it."""
        self.jobs += 1
        plan = make_plan(self.count)
        plan = replace(plan, model=replace(plan.model, model=str(self.model), stage=True))
        run = make_run(self.root / f"run{self.jobs}", plan)
        every = [self.inputs(run, rank, **changes) for rank in range(self.count)]
        roster = Roster(
            transport="tcp", attempt=every[0].attempt, seconds=0.0, ranks=tuple(map(facts, range(self.count)))
        )
        workers = [kind(inputs, roster, rank) for rank, inputs in enumerate(every)]
        self.workers = workers
        tasks = [asyncio.create_task(worker.run()) for worker in workers]
        with open_journal(every[0]) as journal:
            try:
                path = await Coordinator(every[0], roster, journal).run()
            finally:
                await asyncio.gather(*tasks, return_exceptions=True)
        return path, run

    def same(self, rank: int, names: list[str]) -> None:
        """The copy on a disk has the model's bytes."""
        (copy,) = self.copies(rank)
        for name in names:
            assert (copy / name).read_bytes() == (self.model / name).read_bytes(), name
            assert (copy / name).stat().st_mtime_ns == (self.model / name).stat().st_mtime_ns


def facts(rank: int) -> RankFacts:
    return RankFacts(
        rank=rank, node=f"n{rank}", address="127.0.0.1", machine_id="m", cpus=(0,), model=ModelFact(path="m")
    )


def staged(run: RunDir) -> dict[str, Any]:
    (event,) = events(run, "staged")
    return event


def files_of(model: Path) -> list[str]:
    return [path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()]
