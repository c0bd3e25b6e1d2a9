"""docs/examples: a page for each recipe, with the figures of today's plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .golden import EXAMPLES, RECIPES, recipe

INDEX = (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RECIPES)
def test_a_page_has_the_figures_of_its_plan(name: str) -> None:
    page = (EXAMPLES / f"{name}.md").read_text(encoding="utf-8")
    plan = recipe(name)
    notes = {note.key: note for note in plan.explanations}
    figures = [notes["ready_timeout"].value, f"{plan.model.max_model_len:,}"]
    for role in ("prefill", "decode"):
        told = notes[f"{role}.gpu_memory"].value
        figures += re.findall(r"[\d.]+ GiB|[\d,]+(?= tokens)", told)
    missing = [figure for figure in figures if figure not in page]
    assert not missing, f"{name}.md does not say {missing}"


@pytest.mark.parametrize("name", RECIPES)
def test_the_index_leads_to_all_of_a_recipe(name: str) -> None:
    linked = {
        (EXAMPLES / target).resolve()
        for target in re.findall(r"\]\(([^)#]+)\)", INDEX)
        if "://" not in target
    }
    sbatch = Path(__file__).parents[2] / "sbatch"
    files = [EXAMPLES / f"{name}.md", EXAMPLES / f"{name}.yaml"]
    files += [sbatch / f"{name}{suffix}" for suffix in (".plan.txt", ".sh", ".engines.sh")]
    assert {file.resolve() for file in files} <= linked
    assert all(file.is_file() for file in linked)
