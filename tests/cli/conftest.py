from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpcserve.cli.main import main

from ..slurm.fake_slurm import FakeSlurm

MODEL = "model: org/tiny\nengine: fake\ndevice: cpu\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one command line gave."""

    status: int
    out: str
    err: str


@dataclass(slots=True)
class World:
    """A user's login node: a home, a model.yaml, a Slurm that does as it is told."""

    home: Path
    slurm: FakeSlurm
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    @property
    def runs(self) -> Path:
        return self.home / ".hpcserve" / "runs"

    @property
    def model(self) -> Path:
        return self.home / "model.yaml"

    def site(self, name: str, text: str) -> None:
        """A site of the user's own."""
        directory = self.home / ".config" / "hpcserve" / "sites"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}.yaml").write_text(text)

    def __call__(self, *words: str) -> Answer:
        """`hpcserve WORDS`."""
        self.capsys.readouterr()
        status = main(words)
        seen = self.capsys.readouterr()
        return Answer(status=status, out=seen.out, err=seen.err)

    def files(self) -> set[str]:
        """Everything below the home but what was there from the start."""
        found = (str(path.relative_to(self.home)) for path in self.home.rglob("*") if not path.is_dir())
        return {name for name in found if not name.startswith(".config/") and name != "model.yaml"}


@pytest.fixture
def world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[World]:
    home = tmp_path / "home"
    home.mkdir()
    slurm = FakeSlurm(tmp_path / "slurm")
    slurm.accepts(42)
    for name in [name for name in os.environ if name.startswith(("HPCSERVE_", "SBATCH_", "SLURM_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PATH", slurm.path)
    monkeypatch.setenv("HPCSERVE_SITE", "test-cluster")
    monkeypatch.chdir(home)
    world = World(home, slurm, monkeypatch, capsys)
    world.model.write_text(MODEL)
    yield world
