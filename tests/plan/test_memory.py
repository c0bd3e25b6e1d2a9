"""Memory of a GPU, against sums made by hand from the models' published sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcserve.config.model_facts import ModelFacts, stated_facts
from hpcserve.errors import PlanError
from hpcserve.plan.memory import kv_bytes_per_gpu, weights_per_gpu

from .cases import model, plan, site, tp

MODELS = Path(__file__).parents[1] / "render" / "models"
GIB = 1 << 30


def stated(name: str) -> ModelFacts:
    read = json.loads((MODELS / f"{name}.json").read_text())
    return stated_facts(read["config"], path="/m", weight_bytes=read["weight_bytes"])


def llama_bytes(config: dict[str, int]) -> int:
    """bfloat16: embeddings in and out, attention, a gated MLP, two norms a layer and one at the end."""
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner + 2 * hidden
    return 2 * (2 * config["vocab_size"] * hidden + layers * layer + hidden)


@pytest.mark.parametrize("name", ["Llama-3.1-8B-Instruct", "Llama-3.3-70B-Instruct"])
def test_published_sizes_are_those_of_the_configs(name: str) -> None:
    read = json.loads((MODELS / f"{name}.json").read_text())
    assert read["weight_bytes"] == llama_bytes(read["config"])


def test_wide_expert_parallelism_spreads_the_experts_alone() -> None:
    r1 = stated("DeepSeek-R1")
    experts = (61 - 3 + 1) * 256 * 3 * 7168 * 2048
    assert r1.expert_bytes == experts
    each = weights_per_gpu(r1, ranks=1, data=32, spread=True)
    assert each == (688586727753 - experts) + experts / 32
    assert weights_per_gpu(r1, ranks=8, data=4, spread=False) == 688586727753 / 8


def test_a_latent_vector_is_not_split_over_heads() -> None:
    r1, llama = stated("DeepSeek-R1"), stated("Llama-3.3-70B-Instruct")
    assert kv_bytes_per_gpu(r1, tensor=1, pipeline=1) == kv_bytes_per_gpu(r1, tensor=8, pipeline=1) == 70272
    assert kv_bytes_per_gpu(llama, tensor=1, pipeline=1) == 2 * 8 * 128 * 80 * 2
    assert kv_bytes_per_gpu(llama, tensor=4, pipeline=2) == 2 * 8 * 128 * 80 * 2 / 8
    assert kv_bytes_per_gpu(llama, tensor=16, pipeline=1) == 2 * 128 * 80 * 2  # eight heads, kept twice


def test_a_replica_too_narrow_for_the_layers_that_every_rank_has_is_refused() -> None:
    narrow = tp(1, data_parallel=8, expert_parallel=True)
    with pytest.raises(PlanError) as caught:
        plan(model(aggregated=narrow), site(), facts=stated("DeepSeek-R1"))
    # 620 GiB of experts over eight GPUs and 22 GiB for each: not 641 / 8.
    assert caught.value.message == (
        "aggregated: 641 GiB of weights over 8 GPUs is 99 GiB each, but a GPU has 80 GiB"
    )
    assert caught.value.hint == "set `aggregated.tensor_parallel: 2`"


@pytest.mark.parametrize(
    ("engine", "data", "nodes", "each"),
    [
        ("vllm", 8, 1, "8 GPUs is 99 GiB"),
        ("sglang", 8, 1, "1 GPU is 641 GiB"),  # --dp-size: whole engines
        ("sglang", 16, 2, None),  # --attn-dp-size: only attention is apart
    ],
)
def test_experts_are_shared_by_data_parallel_ranks_without_expert_parallelism(
    engine: str, data: int, nodes: int, each: str | None
) -> None:
    spec = model(engine=engine, aggregated=tp(1, data_parallel=data))
    if each is None:
        assert plan(spec, site(), nodes=nodes, facts=stated("DeepSeek-R1")).replicas
        return
    with pytest.raises(PlanError, match=f"641 GiB of weights over {each} each"):
        plan(spec, site(), nodes=nodes, facts=stated("DeepSeek-R1"))


def test_a_dense_model_is_whole_on_each_data_parallel_rank() -> None:
    with pytest.raises(PlanError, match="131 GiB of weights over 1 GPU is 131 GiB each"):
        plan(model(aggregated=tp(1, data_parallel=8)), site(), facts=stated("Llama-3.3-70B-Instruct"))


def test_a_model_with_latent_attention_is_told_to_go_wide() -> None:
    with pytest.raises(PlanError) as caught:
        plan(at=site(), nodes=8, facts=stated("DeepSeek-R1"))
    assert "641 GiB of weights over 8 GPUs is 80 GiB each" in caught.value.message
    assert caught.value.hint is not None
    assert "{tensor_parallel: 1, data_parallel: 32, expert_parallel: true}" in caught.value.hint
    wide = tp(1, data_parallel=32, expert_parallel=True)
    assert len(plan(model(prefill=wide, decode=wide), nodes=8, facts=stated("DeepSeek-R1")).replicas) == 2
