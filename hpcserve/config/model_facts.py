"""What a model's own files say about it, read from disk only.

A model is a directory, or a hub id whose files are in the local Hugging Face cache
(`$HF_HUB_CACHE`, else `$HF_HOME/hub`, else `~/.cache/huggingface/hub`; layout:
https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError

_HUB_ID = re.compile(r"[\w.\-]+(/[\w.\-]+)?", re.ASCII)
_LOCAL_STARTS = ("/", "./", "../", "~")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """None where the files don't say."""

    path: str
    """Directory the facts were read from."""
    architectures: tuple[str, ...] = ()
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    """As many as attention heads when config.json leaves it out."""
    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    num_experts: int | None = None
    """Routed experts of a layer; None for a dense model."""
    max_position_embeddings: int | None = None
    weight_bytes: int | None = None
    """Sum of the sizes of the safetensors files the engine will load."""
    dtype: str | None = None


def is_local(model: str) -> bool:
    """Whether `model` is a path, not a hub id. An existing directory is taken as a path, as engines do."""
    return model in (".", "..") or model.startswith(_LOCAL_STARTS) or Path(model).is_dir()


def read_facts(
    model: str, *, revision: str | None = None, environ: Mapping[str, str] = os.environ
) -> ModelFacts | None:
    """Facts about a path or a cached hub id; None if nothing of a hub id is on disk.

    Raises ConfigError for a path that does not exist or holds no model, and for a broken config.json.
    """
    if is_local(model):
        directory = Path(model).expanduser()
        _require_model(directory, model)
        return _facts(directory)
    if not _HUB_ID.fullmatch(model):
        raise ConfigError(
            f"model: '{model}' is neither a hub id (org/name) nor a path",
            hint="Write org/name, or a path that begins with / or ./.",
        )
    snapshot = _snapshot(model, revision or "main", environ)
    return None if snapshot is None else _facts(snapshot)


def _require_model(directory: Path, model: str) -> None:
    if not directory.is_dir():
        problem = "is a file, not a directory" if directory.exists() else "does not exist"
        raise ConfigError(
            f"model: {model} {problem}",
            hint="Give the directory with the model's config.json, or a hub id (org/name).",
        )
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"model: {model} holds no config.json",
            hint="Give the directory with the model's config.json; in a hub cache that is snapshots/COMMIT.",
        )


def _snapshot(model: str, revision: str, environ: Mapping[str, str]) -> Path | None:
    """The cached snapshot of a hub id at a branch, tag or commit."""
    base = _hub_cache(environ) / ("models--" + model.replace("/", "--"))
    try:
        commit = (base / "refs" / revision).read_text(encoding="ascii").strip()
    except (FileNotFoundError, NotADirectoryError):
        commit = revision  # a commit has no file under refs/
    snapshot = base / "snapshots" / commit
    return snapshot if (snapshot / "config.json").is_file() else None


def _hub_cache(environ: Mapping[str, str]) -> Path:
    if environ.get("HF_HUB_CACHE"):
        return Path(environ["HF_HUB_CACHE"]).expanduser()
    if environ.get("HF_HOME"):
        return Path(environ["HF_HOME"]).expanduser() / "hub"
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


def _facts(directory: Path) -> ModelFacts:
    top = _read_object(directory / "config.json")
    # Multimodal models keep the language model's sizes in a section of their own.
    config = dict(top)
    for name in ("text_config", "llm_config"):
        if isinstance(top.get(name), dict):
            config.update(top[name])
    heads = _integer(config, "num_attention_heads", "n_head")
    architectures = top.get("architectures")
    return ModelFacts(
        path=str(directory),
        architectures=tuple(map(str, architectures)) if isinstance(architectures, list) else (),
        num_attention_heads=heads,
        num_key_value_heads=_integer(config, "num_key_value_heads") or heads,
        num_hidden_layers=_integer(config, "num_hidden_layers", "n_layer"),
        hidden_size=_integer(config, "hidden_size", "n_embd"),
        num_experts=_integer(config, "num_experts", "num_local_experts", "n_routed_experts"),
        max_position_embeddings=_integer(config, "max_position_embeddings", "n_positions"),
        weight_bytes=_weight_bytes(directory),
        dtype=_dtype(config),
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{path}: can't be read: {error.strerror}", hint="Check the file's owner and permissions."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{path}: not JSON: {error}", hint="The download is probably incomplete; fetch the model again."
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a JSON object", hint="Fetch the model again.")
    return data


def _integer(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if type(value) is int and value > 0:
            return value
    return None


def _dtype(config: Mapping[str, Any]) -> str | None:
    for name in ("dtype", "torch_dtype"):  # transformers 5 renamed it
        value = config.get(name)
        if isinstance(value, str):
            return value.removeprefix("torch.")
    return None


def _weight_bytes(directory: Path) -> int | None:
    """Bytes of the weights. Some repositories hold them twice, so the index decides which files count."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = _read_object(index).get("weight_map")
        names = sorted(set(shards.values())) if isinstance(shards, dict) else []
        files = [directory / str(name) for name in names]
    elif (directory / "model.safetensors").is_file():
        files = [directory / "model.safetensors"]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files or not all(file.is_file() for file in files):
        return None
    return sum(file.stat().st_size for file in files)
