"""Dataclasses go to JSON and come back equal, and nothing else comes back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcserve.config.model import ModelSpec
from hpcserve.config.records import from_json, to_json
from hpcserve.config.site import NodeSite, Site
from hpcserve.errors import ConfigError
from hpcserve.plan.plan import Plan, ReplicaPlan

NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
FREE = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a declared type, in range or not: JSON must not care."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return st.one_of(*(st.none() if part is NoneType else values(part) for part in get_args(hint)))
    if origin is Literal:
        return st.sampled_from(get_args(hint))
    if origin is tuple:
        return st.lists(values(get_args(hint)[0]), max_size=2).map(tuple)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        item = get_args(hint)[1]
        return st.dictionaries(st.text(max_size=8), FREE if item is Any else values(item), max_size=2)
    if isinstance(hint, type) and is_dataclass(hint):
        hints = get_type_hints(hint)
        return st.builds(hint, **{item.name: values(hints[item.name]) for item in fields(hint)})
    plain: dict[Any, st.SearchStrategy[Any]] = {
        str: st.text(max_size=8),
        int: st.integers(),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
    }
    return plain[hint]


@given(spec=values(ModelSpec))
def test_any_model_spec_survives_json(spec: ModelSpec) -> None:
    assert from_json(ModelSpec, json.loads(json.dumps(to_json(spec)))) == spec


@given(site=values(Site))
@settings(max_examples=50)
def test_any_site_survives_json(site: Site) -> None:
    assert from_json(Site, json.loads(json.dumps(to_json(site)))) == site


@given(plan=values(Plan))
@settings(max_examples=30)
def test_any_plan_survives_json(plan: Plan) -> None:
    again = from_json(Plan, json.loads(json.dumps(to_json(plan))))
    assert again == plan
    assert isinstance(again.replicas, tuple)


def test_a_tuple_comes_back_as_a_tuple_of_its_own_type() -> None:
    replica = ReplicaPlan(
        name="decode-0", role="decode", nodes=(1, 2), gpus=(0,), tensor_parallel=2, pipeline_parallel=1,
        data_parallel=1, expert_parallel=False,
    )  # fmt: skip
    data = to_json(replica)
    assert data["nodes"] == [1, 2]
    assert from_json(ReplicaPlan, data).nodes == (1, 2)


@pytest.mark.parametrize("value", [math.inf, math.nan, {1: 2}, {"x": object()}, b"bytes"])
def test_what_json_can_not_hold_is_a_bug_of_ours(value: Any) -> None:
    with pytest.raises(TypeError):
        to_json(ModelSpec(model="a", engine_args={"flag": value}))


def test_a_class_is_not_an_instance() -> None:
    with pytest.raises(TypeError, match="not a dataclass instance"):
        to_json(ModelSpec)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    both: tuple[int, str]
    rate: float = 1.0


def test_an_integer_in_json_is_a_number_too() -> None:
    rate = from_json(Pair, {"both": [1, "a"], "rate": 2}).rate
    assert rate == 2.0 and isinstance(rate, float)


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (Pair, [], "plan.json: the top must be an object, not list"),
        (Pair, {}, "plan.json: the top has no 'both'"),
        (Pair, {"both": [1, "a"], "x": 1}, "plan.json: the top has an unknown field 'x'"),
        (Pair, {"both": [1]}, "plan.json: both must have 2 items, not 1"),
        (Pair, {"both": "1a"}, "plan.json: both must be an array, not str"),
        (Pair, {"both": ["1", "a"]}, "plan.json: both.0 must be int, not str"),
        (Pair, {"both": [True, "a"]}, "plan.json: both.0 must be int, not bool"),
        (Pair, {"both": [1, None]}, "plan.json: both.1 must be str, not null"),
        (Pair, {"both": [1, "a"], "rate": "2"}, "plan.json: rate must be float, not str"),
        (NodeSite, {"gpus": 1, "arch": "arm"}, "plan.json: arch must be one of x86_64, aarch64, not 'arm'"),
        (ModelSpec, {"model": "a", "env": {"A": 1}}, "plan.json: env.A must be str, not int"),
        (ModelSpec, {"model": "a", "nodes": 1.0}, "plan.json: nodes must be int, not float"),
        (ModelSpec, {"model": "a", "decode": {"nodes": "1"}}, "plan.json: decode.nodes must be int, not str"),
        (ModelSpec, {"model": "a", "workload": None}, "plan.json: workload must be an object, not null"),
    ],
)
def test_refuses_what_it_did_not_write(kind: type, data: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(kind, data, where="plan.json")
    assert caught.value.message == message
    assert "launch again" in str(caught.value.hint)
