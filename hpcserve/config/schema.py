"""JSON schemas (draft 2020-12) of model.yaml and of site configs, for editors.

They are made from the same declarations as the loader and shipped under `schemas/`;
docs/generate_reference.py writes them. They read a file as YAML 1.2, like the loader. What JSON
Schema can't say (a port range's order, `extends` naming a known site) the loader checks alone.
"""

from __future__ import annotations

from typing import Any

from .declarations import Declared, declared
from .load import SECTION_NAME, VARIABLE
from .model import ModelSpec
from .quantities import CLOCK
from .site import Site

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_ONE_LINE = r"^[^\u0000-\u001f\u007f\u2028\u2029]*$"

Schema = dict[str, Any]


def model_schema() -> Schema:
    """The schema of model.yaml."""
    return {"$schema": _DIALECT, "title": "hpcserve model.yaml", **_section(ModelSpec)}


def site_schema() -> Schema:
    """The schema of a site config. With `extends` nothing is required; `name` is the file's by default."""
    schema = _section(Site)
    extends = {
        "type": "string",
        "minLength": 1,
        "description": "Another site whose keys hold where this file has none.",
    }
    required = [name for name in schema.pop("required") if name != "name"]
    schema["properties"] = {"extends": extends, **_relaxed(schema["properties"])}
    own = {
        "required": required,
        "properties": {name: {"required": _required(Site, name)} for name in required},
    }
    return {
        "$schema": _DIALECT,
        "title": "hpcserve site config",
        **schema,
        "anyOf": [{"required": ["extends"]}, own],
    }


def _required(section: type, name: str) -> list[str]:
    inner = declared(section)[name].section
    return [key for key, item in declared(inner).items() if item.required] if inner else []


def _relaxed(properties: Schema) -> Schema:
    return {
        name: {key: value for key, value in schema.items() if key != "required"}
        for name, schema in properties.items()
    }


def _section(section: type) -> Schema:
    keys = declared(section)
    schema: Schema = {
        "type": "object",
        "properties": {name: _key(item) for name, item in keys.items()},
        "additionalProperties": False,
    }
    required = [name for name, item in keys.items() if item.required]
    return {**schema, "required": required} if required else schema


def _key(item: Declared) -> Schema:
    schema = _shape(item)
    if item.optional:
        schema = {"anyOf": [schema, {"type": "null"}]}
    schema["description"] = item.info.doc
    if isinstance(item.default, str | int | float) and item.default != "":
        schema["default"] = item.default
    return schema


def _shape(item: Declared) -> Schema:
    if item.section is not None:
        inner = _section(item.section)
        if item.shape == "section":
            return inner
        inner.pop("required", None)  # the site that is extended may have it
        names = {"pattern": f"^{SECTION_NAME.pattern}$"}
        return {"type": "object", "propertyNames": names, "additionalProperties": inner}
    if item.choices:
        return {"enum": list(item.choices)}
    if item.shape == "environment":
        return {
            "type": "object",
            "propertyNames": {"pattern": f"^{VARIABLE.pattern}$"},
            "additionalProperties": {"type": ["string", "number"]},
        }
    if item.shape == "free":
        return {"type": "object"}
    if item.shape == "strings":
        return {"type": "array", "items": _text(item)}
    if item.shape == "text":
        return _text(item)
    number: Schema = {"type": item.shape, **_limits(item)}
    if item.info.kind == "duration":
        return {"anyOf": [number, {"type": "string", "pattern": f"^{CLOCK}$"}]}
    return number


def _limits(item: Declared) -> Schema:
    limits = {"minimum": item.info.minimum, "maximum": item.info.maximum}
    return {name: value for name, value in limits.items() if value is not None}


def _text(item: Declared) -> Schema:
    schema: Schema = {"type": "string"}
    if item.info.pattern is not None:
        schema["pattern"] = f"^(?:{item.info.pattern})$"
    elif item.info.kind != "text":
        schema["pattern"] = _ONE_LINE
    if item.default != "":
        schema["minLength"] = 1
    return schema
