"""TensorRT-LLM's command line, worker file and environment by role and size; 1.2.1 takes them all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpcserve.config.model import ModelSpec, RoleSpec
from hpcserve.config.site import ContainerSite, Site
from hpcserve.engines.base import EngineCommand
from hpcserve.engines.tensorrt_llm import COMMAND_ONLY, RESERVED, WORKER_FILE, TensorRTLLM
from hpcserve.errors import ConfigError, PlanError
from tests.plan.cases import model, plan, site, tp

from .cases import command, context, flags

SCHEMA = json.loads(Path(__file__).with_name("tensorrt_llm_schema.json").read_text())
"""The flags of `trtllm-serve serve` and the keys of its file in 1.2.1; where they are from is in it."""

PAIR = model(engine="tensorrt-llm", prefill=tp(4), decode=tp(4))


def alone(**spec: object) -> ModelSpec:
    return model(engine="tensorrt-llm", **spec)


def worker(made: EngineCommand) -> dict[str, Any]:
    """What the worker file says."""
    assert set(made.files) == {WORKER_FILE}
    found: dict[str, Any] = yaml.safe_load(made.files[WORKER_FILE])
    return found


def refused(made: EngineCommand) -> list[str]:
    """Flags, keys and nested keys that TensorRT-LLM 1.2.1 does not have."""
    argv = made.argv[made.argv.index("--served-model-name") + 3 :]
    known = set(SCHEMA["flags"])
    wrong = [word for word in argv if word.startswith("--") and word.removeprefix("--") not in known]
    for key, value in worker(made).items():
        if key not in SCHEMA["keys"]:
            wrong.append(key)
        elif isinstance(value, dict):
            inner = SCHEMA["nested"].get(key, value)
            wrong += [f"{key}.{name}" for name in value if name not in inner]
    return wrong


def test_prefill_on_gpus() -> None:
    made = command(PAIR, site(), replica="prefill-1", nodes=2)
    assert made.argv == (
        "/opt/bin/python", "-m", "hpcserve.engines.tensorrt_llm_server",
        "--served-model-name", "llama",
        "/models/llama",
        "--host", "10.0.0.1", "--port", "20001", "--backend", "pytorch",
        "--tp_size", "4",
        "--config", "/tmp/job/tensorrt-llm.yaml",
    )  # fmt: skip
    assert worker(made) == {
        "disable_overlap_scheduler": True,
        "enable_iter_perf_stats": True,
        "cache_transceiver_config": {"backend": "NIXL", "kv_transfer_timeout_ms": 30_000},
    }
    assert made.env == {
        "CUDA_VISIBLE_DEVICES": "4,5,6,7",
        "FLASHINFER_WORKSPACE_BASE": "/tmp/job",
        "HF_HUB_OFFLINE": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_ALLOW_RUN_AS_ROOT": "1",
        "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/job/inductor",
        "TRITON_CACHE_DIR": "/tmp/job/triton",
    }


def test_decode_keeps_the_overlap_scheduler() -> None:
    assert worker(command(PAIR, site(), replica="decode-0", nodes=2)) == {
        "enable_iter_perf_stats": True,
        "cache_transceiver_config": {"backend": "NIXL", "kv_transfer_timeout_ms": 30_000},
    }


def test_aggregated_has_no_transfer() -> None:
    assert worker(command(alone(), site(), replica="aggregated-0")) == {"enable_iter_perf_stats": True}


@pytest.mark.parametrize(
    ("spec", "sizes", "apart"),
    [
        (tp(8), {"--tp_size": "8"}, False),
        (tp(4, pipeline_parallel=2), {"--tp_size": "4", "--pp_size": "2"}, False),
        (tp(8, expert_parallel=True), {"--tp_size": "8", "--ep_size": "8"}, False),
        (tp(1, data_parallel=8, expert_parallel=True), {"--tp_size": "8", "--ep_size": "8"}, True),
    ],
)
def test_sizes(spec: RoleSpec, sizes: dict[str, str], apart: bool) -> None:
    made = command(alone(aggregated=spec), site(), replica="aggregated-0")
    found = flags(made.argv)
    assert {name: value for name, value in found.items() if name.endswith("_size")} == sizes
    assert worker(made).get("enable_attention_dp", False) is apart
    assert refused(made) == []


def test_settings_of_model_yaml() -> None:
    made = command(
        alone(revision="abc", dtype="bfloat16", max_model_len=4096, kv_lease=45),
        site(),
        replica="aggregated-0",
    )
    found = flags(made.argv)
    assert (found["--revision"], found["--max_seq_len"]) == ("abc", "4096")
    assert worker(made)["dtype"] == "bfloat16" and refused(made) == []


def test_engine_args_are_keys_of_the_worker_file_or_flags_that_only_the_command_knows() -> None:
    args = {
        "max-batch-size": 64,
        "kv_cache_config": {"free_gpu_memory_fraction": 0.8},
        "cache-transceiver-config": {"max_tokens_in_buffer": 16384},
        "tool_parser": "qwen3",
        "media-io-kwargs": {"video": {"num_frames": 8}},
        "custom-module-dirs": ["/a", "/b"],
        "reasoning-parser": "qwen3",
    }
    own = replace(PAIR, engine_args=args, decode=replace(tp(4), engine_args={"max_batch_size": 128}))
    made = command(own, site(), replica="decode-0", nodes=2)
    found = worker(made)
    assert (found["max_batch_size"], found["reasoning_parser"]) == (128, "qwen3")
    assert found["kv_cache_config"] == {"free_gpu_memory_fraction": 0.8}
    assert found["cache_transceiver_config"] == {
        "backend": "NIXL", "kv_transfer_timeout_ms": 30_000, "max_tokens_in_buffer": 16384,
    }  # fmt: skip
    end = made.argv[made.argv.index("--config") + 2 :]
    assert end == (
        "--tool_parser", "qwen3", "--media_io_kwargs", '{"video": {"num_frames": 8}}',
        "--custom_module_dirs", "/a", "--custom_module_dirs", "/b",
    )  # fmt: skip
    assert refused(made) == []


def test_a_key_that_1_2_does_not_have_is_found_by_its_name() -> None:
    """The schema can fail: what later versions have is not in it."""
    args = {"cache_transceiver_config": {"kv_cache_bounce_size_mb": 1}, "video_pruning_rate": 1}
    made = command(replace(PAIR, engine_args=args), site(), replica="decode-0", nodes=2)
    assert refused(made) == ["video_pruning_rate", "cache_transceiver_config.kv_cache_bounce_size_mb"]
    later = replace(made, argv=(*made.argv, "--grpc"))
    assert refused(later)[0] == "--grpc"


def test_every_flag_that_stays_one_and_every_reserved_name_is_one_of_1_2() -> None:
    known = {*SCHEMA["flags"], *SCHEMA["keys"]}
    assert {flag.replace("-", "_") for flag in COMMAND_ONLY} <= set(SCHEMA["flags"]) - set(SCHEMA["keys"])
    # `served_model_name` is 1.3's, and `disagg_cluster` a key that the command takes out of the file.
    assert {flag.replace("-", "_") for flag in RESERVED} - known == {"served_model_name", "disagg_cluster"}


@pytest.mark.parametrize("flag", [*RESERVED, "tp", "served_model"])
def test_flags_that_hpcserve_sets_are_refused_with_a_hint(flag: str) -> None:
    with pytest.raises(ConfigError, match=r"engine_args\..*hpcserve sets") as caught:
        command(alone(engine_args={flag: "x"}), site(), replica="aggregated-0")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            {"cache-transceiver-config": {"backend": "UCX"}},
            r"cache-transceiver-config\.backend: hpcserve sets",
        ),
        (
            {"cache-transceiver-config": {"kv_transfer_timeout_ms": 1}},
            r"kv_transfer_timeout_ms: hpcserve sets",
        ),
        ({"cache_transceiver_config": "NIXL"}, "must be a mapping"),
        ({"disable-overlap-scheduler": False}, "prefill replicas have no overlap scheduler"),
    ],
)
def test_what_a_pair_needs_can_not_be_taken_away(args: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        command(replace(PAIR, engine_args=args), site(), replica="prefill-0", nodes=2)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["TRTLLM_API_KEY", "TLLM_DISABLE_MPI", "TRTLLM_USE_UCX_KVCACHE"])
def test_variables_that_hpcserve_sets_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"env.{name}"):
        command(alone(env={name: "1"}), site(), replica="aggregated-0")


def test_what_it_can_not_do_is_said() -> None:
    with pytest.raises(ConfigError, match="needs GPUs"):
        command(alone(aggregated=RoleSpec()), site(gpus=0), replica="aggregated-0")
    with pytest.raises(ConfigError, match="no setting for 'fp8'"):
        command(alone(quantization="fp8"), site(), replica="aggregated-0")
    with pytest.raises(ConfigError, match="over all ranks or over none"):
        command(alone(aggregated=tp(2, data_parallel=4)), site(), replica="aggregated-0")


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (replace(site(), scheduler="local"), "site here has no Slurm"),
        (site(mpi="none"), "slurm.mpi of site here is none"),
        (
            replace(site(), container=ContainerSite(runtime="pyxis", image="i")),
            "inside pyxis there are no Slurm",
        ),
    ],
)
def test_a_replica_over_several_nodes_is_refused_where_srun_can_not_start_it(at: Site, message: str) -> None:
    with pytest.raises(
        PlanError, match=f"over 2 nodes is an MPI program that srun starts.*{message}"
    ) as caught:
        plan(alone(aggregated=tp(16)), at, nodes=2)
    assert "lower the parallel sizes of `aggregated`" in str(caught.value.hint)
    plan(alone(aggregated=tp(8)), at, nodes=1)


def test_over_several_nodes_it_is_told_how_many_gpus_each_has() -> None:
    made = command(alone(aggregated=tp(16)), site(), replica="aggregated-0", nodes=2)
    assert flags(made.argv)["--tp_size"] == "16" and flags(made.argv)["--gpus_per_node"] == "8"
    assert refused(made) == []
    assert made.env["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
    assert "--gpus_per_node" not in command(PAIR, site(), replica="prefill-1", nodes=2).argv


def test_its_nixl_agents_name_the_interface_that_the_node_found() -> None:
    found = {"GLOO_SOCKET_IFNAME": "ib0", "UCX_NET_DEVICES": "mlx5_0:1"}
    for spec, nodes, replica, interface in (
        (PAIR, 2, "decode-0", "ib0"),
        (alone(), 1, "aggregated-0", None),
    ):
        made = command(spec, site(), replica=replica, nodes=nodes, fabric_env=found)
        assert made.env.get("TRTLLM_NIXL_INTERFACE") == interface
        assert made.env["UCX_NET_DEVICES"] == "mlx5_0:1"


def test_it_has_one_port_and_publishes_no_kv_events() -> None:
    made = context(PAIR, site(), replica="prefill-0", nodes=2)
    assert TensorRTLLM().ports(made.replica) == {"http": 1}
    assert TensorRTLLM().kv_event_endpoints(made) == ()
