"""The JSON schemas say what the loader says."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml

from hpcserve.config.load import load_model
from hpcserve.config.resources import resources
from hpcserve.config.schema import model_schema, site_schema
from hpcserve.config.sites import find_site
from hpcserve.errors import ConfigError

from .files import Files

ROOT = Path(__file__).resolve().parents[2]
MODEL = jsonschema.Draft202012Validator(model_schema())
SITE = jsonschema.Draft202012Validator(site_schema())


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "docs/generate_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_schemas_are_schemas() -> None:
    for schema in (model_schema(), site_schema()):
        jsonschema.Draft202012Validator.check_schema(schema)


def test_the_generated_files_are_current() -> None:
    assert generator().stale() == [], "run `make docs`"


def test_a_stale_file_fails_the_check_and_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = generator()
    name = "docs/reference/model-yaml.md"
    monkeypatch.setattr(module, "FILES", {name: lambda: "other"})
    before = (ROOT / name).read_text()
    assert module.main(["--check"]) == 1
    assert f"stale: {name}" in capsys.readouterr().err
    assert (ROOT / name).read_text() == before


class Core(yaml.SafeLoader):
    """YAML 1.2's core schema, as editors read it: only these plain words are not text."""


Core.yaml_implicit_resolvers = {}
for tag, pattern, first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
):
    Core.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), first)


@pytest.mark.parametrize("path", sorted(resources("site-configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_sites_are_valid(path: Path) -> None:
    SITE.validate(yaml.load(path.read_text(), Loader=Core))


@pytest.mark.parametrize("path", sorted(resources("site-configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_sites_name_the_schema_for_editors(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    relative = first.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / relative).resolve() == ROOT / "hpcserve/config/schemas/site.schema.json"


GOOD_MODELS: tuple[dict[str, Any], ...] = (
    {"model": "a"},
    {"model": "a", "served_name": "org/a:b", "dtype": None, "max_model_len": 16},
    {"model": "a", "walltime": "04:00:00", "drain": 0, "kv_lease": "1:00", "ready_timeout": "1-12"},
    {"model": "a", "decode": None, "prefill": {}, "aggregated": {"nodes": 1, "expert_parallel": True}},
    {"model": "a", "env": {"A": 1, "B": "x", "C": 1.5}, "engine_args": {"x": [1, {"y": None}], "z": True}},
    {"model": "a", "workload": {"requests_per_second": 2}, "router": {"port": 65535, "auth": False}},
)

BAD_MODELS: tuple[dict[str, Any], ...] = (
    {},
    {"model": None},
    {"model": ""},
    {"model": 7},
    {"model": "a\nb"},
    {"model": "a", "modle": "b"},
    {"model": "a", "served_name": "a b"},
    {"model": "a", "engine": "vlm"},
    {"model": "a", "engine": None},
    {"model": "a", "nodes": 0},
    {"model": "a", "nodes": "2"},
    {"model": "a", "nodes": 1.5},
    {"model": "a", "max_model_len": True},
    {"model": "a", "walltime": "4h"},
    {"model": "a", "walltime": "30"},
    {"model": "a", "walltime": 59},
    {"model": "a", "walltime": "1:61:00"},
    {"model": "a", "walltime": "1-24"},
    {"model": "a", "drain": -1},
    {"model": "a", "drain": None},
    {"model": "a", "decode": 2},
    {"model": "a", "decode": {"replicsa": 2}},
    {"model": "a", "workload": None},
    {"model": "a", "env": {"MY-VAR": "1"}},
    {"model": "a", "env": {"A": True}},
    {"model": "a", "env": {"A": None}},
    {"model": "a", "env": ["A=1"]},
    {"model": "a", "engine_args": ["--x"]},
    {"model": "a", "router": {"auth": "yes"}},
    {"model": "a", "router": {"port": 65536}},
    {"model": "a", "router": {"retries": 11}},
)

NODE = {"node": {"gpus": 4}}
GOOD_SITES: tuple[dict[str, Any], ...] = (
    NODE,
    {"name": "mine", **NODE},
    {"extends": "local"},
    {"extends": "local", "node": {"cpus": 4}, "slurm": {"partition": None}},
    {**NODE, "slurm": {"checked": "", "memory": "0", "extra": ["--comment=x"], "max_walltime": "2-00:00:00"}},
    {**NODE, "setup": {"script": "line 1\nline 2\n", "modules": ["cuda/12"]}},
)
BAD_SITES: tuple[dict[str, Any], ...] = (
    {},
    {"name": "mine"},
    {"name": "Mine", **NODE},
    {"node": {}},
    {"node": None},
    {"extends": ""},
    {"extends": ["local"]},
    {"extends": "local", "slrm": {}},
    {"extends": "local", "node": {"gpus": 65}},
    {"node": {"gpus": 4, "arch": "arm"}},
    {**NODE, "scheduler": "pbs"},
    {**NODE, "slurm": {"memory": 0}},
    {**NODE, "slurm": {"memory": "10GB"}},
    {**NODE, "slurm": {"checked": "yesterday"}},
    {**NODE, "slurm": {"extra": ["comment=x"]}},
    {**NODE, "slurm": {"partition": "x\ny"}},
    {**NODE, "setup": {"modules": "cuda"}},
    {**NODE, "setup": {"modules": [3.11]}},
    {**NODE, "ports": {"low": 80}},
)


@pytest.mark.parametrize("data", GOOD_MODELS, ids=json.dumps)
def test_takes_the_models_that_the_loader_takes(files: Files, data: dict[str, Any]) -> None:
    files.write("model.yaml", json.dumps(data))
    load_model("model.yaml")
    MODEL.validate(data)


@pytest.mark.parametrize("data", BAD_MODELS, ids=json.dumps)
def test_refuses_the_models_that_the_loader_refuses(files: Files, data: dict[str, Any]) -> None:
    files.write("model.yaml", json.dumps(data))
    with pytest.raises(ConfigError):
        load_model("model.yaml")
    assert not MODEL.is_valid(data)


@pytest.mark.parametrize("data", GOOD_SITES, ids=json.dumps)
def test_takes_the_sites_that_the_loader_takes(files: Files, data: dict[str, Any]) -> None:
    files.write("mine.yaml", json.dumps(data))
    find_site("mine.yaml", environ=files.environ(), hostname="x")
    SITE.validate(data)


@pytest.mark.parametrize("data", BAD_SITES, ids=json.dumps)
def test_refuses_the_sites_that_the_loader_refuses(files: Files, data: dict[str, Any]) -> None:
    files.write("mine.yaml", json.dumps(data))
    with pytest.raises(ConfigError):
        find_site("mine.yaml", environ=files.environ(), hostname="x")
    assert not SITE.is_valid(data)
