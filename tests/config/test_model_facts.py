"""Facts about a model come from its files on disk, whatever shape they have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcserve.config.model_facts import ModelFacts, is_local, read_facts
from hpcserve.errors import ConfigError

from .files import Files

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


def model(files: Files, name: str, config: dict[str, Any], **weights: int) -> Path:
    """A model directory with weight files of the given sizes, `_` in their names standing for `-`."""
    path = files.write(f"{name}/config.json", json.dumps(config)).parent
    for file, size in weights.items():
        (path / f"{file.replace('_', '-')}.safetensors").write_bytes(b"x" * size)
    return path


def facts(path: Path | str, **environ: str) -> ModelFacts:
    found = read_facts(str(path), environ=environ)
    assert found is not None
    return found


def test_reads_a_directory(files: Files) -> None:
    path = model(files, "llama", LLAMA, model=1000)
    assert facts(path) == ModelFacts(
        path=str(path),
        architectures=("LlamaForCausalLM",),
        num_attention_heads=64,
        num_key_value_heads=8,
        num_hidden_layers=80,
        hidden_size=8192,
        num_experts=None,
        max_position_embeddings=131072,
        weight_bytes=1000,
        kv_values=2 * 8 * 128,
        dtype="bfloat16",
    )


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_knows_the_names_of_experts(files: Files, name: str) -> None:
    assert facts(model(files, "moe", {**LLAMA, name: 256})).num_experts == 256


def test_a_model_without_grouped_heads_has_as_many_as_attention_heads(files: Files) -> None:
    found = facts(model(files, "gpt2", {"n_head": 12, "n_layer": 6, "n_embd": 768, "n_positions": 1024}))
    assert (found.num_attention_heads, found.num_key_value_heads) == (12, 12)
    assert (found.num_hidden_layers, found.hidden_size, found.max_position_embeddings) == (6, 768, 1024)


def test_a_multimodal_model_has_its_sizes_in_a_section(files: Files) -> None:
    config = {"architectures": ["X"], "text_config": LLAMA | {"dtype": "torch.float16"}, "vision_config": {}}
    found = facts(model(files, "vision", config))
    assert (found.num_attention_heads, found.dtype) == (64, "float16")


def test_values_of_a_strange_type_count_as_unknown(files: Files) -> None:
    config = {"num_attention_heads": [1, 2], "hidden_size": True, "dtype": {"x": 1}, "architectures": "X"}
    found = facts(model(files, "odd", config))
    assert (found.num_attention_heads, found.hidden_size, found.dtype, found.architectures) == (
        None, None, None, (),
    )  # fmt: skip


def test_weights_that_are_there_twice_count_once(files: Files) -> None:
    path = model(files, "twice", LLAMA, part_1=300, part_2=200, consolidated=500)
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors", "c": "part-2.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert facts(path).weight_bytes == 500


def test_one_file_of_weights_counts_alone(files: Files) -> None:
    assert facts(model(files, "one", LLAMA, model=300, consolidated=300)).weight_bytes == 300


def test_weights_without_an_index_are_summed(files: Files) -> None:
    assert facts(model(files, "parts", LLAMA, a=1, b=2)).weight_bytes == 3


def test_an_incomplete_download_has_no_size(files: Files) -> None:
    path = model(files, "half", LLAMA, part_1=300)
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert facts(path).weight_bytes is None


@pytest.mark.parametrize(
    ("variable", "cache"),
    [
        ("HF_HUB_CACHE", "."),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    ],
)
def test_finds_a_hub_id_in_the_cache(files: Files, variable: str, cache: str) -> None:
    base = f"top/{cache}/models--org--name"
    path = model(files, f"{base}/snapshots/abc123", LLAMA)
    files.write(f"{base}/refs/main", "abc123")
    files.write(f"{base}/refs/v1", "gone")
    environ = {variable: str(files.root / "top")}
    for revision in (None, "main", "abc123"):
        found = read_facts("org/name", revision=revision, environ=environ)
        assert found is not None and Path(found.path).resolve() == path
    assert read_facts("org/name", revision="v1", environ=environ) is None
    assert read_facts("org/other", environ=environ) is None


def test_a_cached_model_is_a_directory_of_links(files: Files) -> None:
    blob = files.root / "hub/models--m/blobs/f00"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"x" * 77)
    path = model(files, "hub/models--m/snapshots/abc", LLAMA)
    (path / "model.safetensors").symlink_to(blob)
    files.write("hub/models--m/refs/main", "abc\n")
    assert facts("m", HF_HOME=str(files.root)).weight_bytes == 77


def test_an_existing_directory_is_a_path_even_if_it_looks_like_a_hub_id(files: Files) -> None:
    model(files, "org/name", LLAMA)
    assert is_local("org/name") and not is_local("org/other")
    assert facts("org/name").path == "org/name"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./absent", "model: ./absent does not exist"),
        ("/absent/model", "model: /absent/model does not exist"),
        ("~/absent-model", "model: ~/absent-model does not exist"),
        ("./file.gguf", "model: ./file.gguf is a file, not a directory"),
        ("./empty", "model: ./empty holds no config.json"),
        ("empty", "model: empty holds no config.json"),
        ("a/b/c", "model: 'a/b/c' is neither a hub id (org/name) nor a path"),
        ("org/name?x=1", "model: 'org/name?x=1' is neither a hub id (org/name) nor a path"),
        ("models/../x y", "model: 'models/../x y' is neither a hub id (org/name) nor a path"),
        ("./broken", "broken/config.json: not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("./array", "array/config.json: must be a JSON object"),
    ],
)
def test_refuses(files: Files, name: str, message: str) -> None:
    files.write("file.gguf", "")
    (files.root / "empty").mkdir()
    files.write("broken/config.json", "nonsense")
    files.write("array/config.json", "[]")
    with pytest.raises(ConfigError) as caught:
        read_facts(name, environ=files.environ())
    assert caught.value.message == message
    assert caught.value.hint


DEEPSEEK = {
    "num_attention_heads": 128, "num_hidden_layers": 61, "hidden_size": 7168, "n_routed_experts": 256,
    "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "num_nextn_predict_layers": 1,
    "torch_dtype": "bfloat16", "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8"},
}  # fmt: skip


def test_experts_of_a_quantized_model_are_counted(files: Files) -> None:
    found = facts(model(files, "r1", DEEPSEEK))
    assert found.expert_bytes == (61 - 3 + 1) * 256 * 3 * 7168 * 2048
    assert (found.kv_values, found.kv_latent, found.kv_bytes) == (576, True, 576 * 61 * 2)


@pytest.mark.parametrize(
    "change",
    [
        {"quantization_config": {"quant_method": "awq"}},
        {"decoder_sparse_step": 2},
        {"mlp_only_layers": [0]},
        {"moe_intermediate_size": None},
    ],
)
def test_experts_that_are_not_plain_are_not_guessed(files: Files, change: dict[str, Any]) -> None:
    assert facts(model(files, "moe", {**DEEPSEEK, **change})).expert_bytes is None


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({}, 2 * 8 * 128),
        ({"head_dim": 64}, 2 * 8 * 64),
        ({"sliding_window": 4096}, None),
        ({"sliding_window": 4096, "use_sliding_window": False}, 2 * 8 * 128),
        ({"layer_types": ["full_attention", "sliding_attention"]}, None),
        ({"full_attention_interval": 4}, None),
    ],
)
def test_kv_cache_of_a_token(files: Files, change: dict[str, Any], values: int | None) -> None:
    assert facts(model(files, "llama", {**LLAMA, **change})).kv_values == values
