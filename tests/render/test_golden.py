"""sbatch/ holds what the renderer writes today. A changed script is a change to read in review."""

from __future__ import annotations

import pytest

from .golden import DIRECTORY, files


@pytest.mark.parametrize("name", sorted(files()))
def test_golden_script_is_what_is_rendered(name: str) -> None:
    again = "run `python -m tests.render.golden --write` and read the difference"
    path = DIRECTORY / name
    assert path.exists(), again
    assert path.read_text(encoding="utf-8") == files()[name], again


def test_nothing_else_is_in_the_directory_of_golden_scripts() -> None:
    assert {path.name for path in DIRECTORY.iterdir()} - {"README.md"} == set(files())
