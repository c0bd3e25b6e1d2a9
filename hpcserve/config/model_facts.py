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
    expert_bytes: int | None = None
    """The part of them that is routed experts."""
    kv_values: int | None = None
    """Values that one token keeps in the KV cache of one layer, of all heads."""
    kv_latent: bool = False
    """They are one latent vector for all heads (multi-head latent attention), which each GPU keeps whole."""
    dtype: str | None = None

    @property
    def kv_bytes(self) -> int | None:
        """Bytes of one token in the KV cache of all layers, in the model's own type."""
        size = _SIZES.get(self.dtype or "")
        if self.kv_values is None or self.num_hidden_layers is None or size is None:
            return None
        return self.kv_values * self.num_hidden_layers * size


_OF_STATES = (
    "mamba_", "ssm_", "linear_", "hybrid_", "full_attention_interval", "attn_layer_", "attn_type_list",
)  # fmt: skip
"""Beginnings of keys of models in which only some layers have a KV cache. Qwen3-Next, Jamba, Nemotron-H, Kimi
Linear and MiniMax-Text write such keys, and not all of them `layer_types`."""
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
    return stated_facts(
        _read_object(directory / "config.json"), path=str(directory), weight_bytes=_weight_bytes(directory)
    )


def stated_facts(top: Mapping[str, Any], *, path: str, weight_bytes: int | None) -> ModelFacts:
    """What a config.json says; the size of the weights is not in it."""
    # Multimodal models keep the language model's sizes in a section of their own.
    config = dict(top)
    for name in ("text_config", "llm_config"):
        if isinstance(top.get(name), dict):
            config.update(top[name])
    heads = _integer(config, "num_attention_heads", "n_head")
    architectures = top.get("architectures")
    return ModelFacts(
        path=path,
        architectures=tuple(map(str, architectures)) if isinstance(architectures, list) else (),
        num_attention_heads=heads,
        num_key_value_heads=_integer(config, "num_key_value_heads") or heads,
        num_hidden_layers=_integer(config, "num_hidden_layers", "n_layer"),
        hidden_size=_integer(config, "hidden_size", "n_embd"),
        num_experts=_integer(config, "num_experts", "num_local_experts", "n_routed_experts"),
        max_position_embeddings=_integer(config, "max_position_embeddings", "n_positions"),
        weight_bytes=weight_bytes,
        expert_bytes=_expert_bytes(config),
        kv_values=_kv_values(config),
        kv_latent=_integer(config, "kv_lora_rank") is not None,
        dtype=_dtype(config),
    )


def _expert_bytes(config: Mapping[str, Any]) -> int | None:
    """Three matrices per expert and layer, as in Mixtral, Qwen-MoE and DeepSeek; None if not clear."""
    experts = _integer(config, "num_experts", "num_local_experts", "n_routed_experts")
    hidden, layers = _integer(config, "hidden_size"), _integer(config, "num_hidden_layers")
    inner = _integer(config, "moe_intermediate_size", "intermediate_size")
    method = config.get("quantization_config")
    if isinstance(method, dict):
        size = {"fp8": 1}.get(str(method.get("quant_method")))
    else:
        size = _SIZES.get(_dtype(config) or "")
    irregular = config.get("mlp_only_layers") or any(
        config.get(name, 1) not in (None, 1) for name in ("moe_layer_freq", "decoder_sparse_step")
    )
    if irregular or not (experts and hidden and layers and inner and size):
        return None
    sparse = layers - (_integer(config, "first_k_dense_replace") or 0)
    sparse += _integer(config, "num_nextn_predict_layers") or 0
    return sparse * experts * 3 * hidden * inner * size


def _kv_values(config: Mapping[str, Any]) -> int | None:
    """None where layers differ: those with a window or a state keep less than the others."""
    kinds = config.get("layer_types")
    windowed = config.get("sliding_window") and config.get("use_sliding_window") is not False
    stateful = any(name.startswith(_OF_STATES) for name in config)
    if windowed or stateful or (isinstance(kinds, list) and set(kinds) != {"full_attention"}):
        return None
    latent = _integer(config, "kv_lora_rank")
    if latent is not None:  # DeepSeek-V2, arXiv:2405.04434, section 2.1
        return latent + (_integer(config, "qk_rope_head_dim") or 0)
    heads, hidden = (
        _integer(config, "num_attention_heads", "n_head"),
        _integer(config, "hidden_size", "n_embd"),
    )
    width = _integer(config, "head_dim") or (hidden // heads if hidden and heads else None)
    return 2 * (_integer(config, "num_key_value_heads") or heads or 0) * width if width else None


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
