"""Every engine that model.yaml can name has its abilities, and an adapter."""

from __future__ import annotations

from dataclasses import fields

from hpcserve import engines
from hpcserve.config.model import ModelSpec
from hpcserve.plan.abilities import ABILITIES


def test_each_engine_is_known_everywhere() -> None:
    (engine,) = [field for field in fields(ModelSpec) if field.name == "engine"]
    choices = engine.metadata["key"].choices
    assert set(ABILITIES) == set(choices)
    assert [engines.get(name).name for name in choices] == list(choices)


def test_what_is_planned_as_a_step_is_started_as_one() -> None:
    stepped = {name for name in ABILITIES if engines.get(name).mpi_launcher is not None}
    assert {name for name, able in ABILITIES.items() if able.by_step} == stepped == {"tensorrt-llm"}
