"""vLLM's command line and environment for each role, device and size."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from hpcserve.config.model import KvOffloadSpec, ModelSpec, RoleSpec
from hpcserve.config.site import NetworkSite, NodeSite, StorageSite
from hpcserve.engines.base import EngineCommand
from hpcserve.engines.vllm import RESERVED, VLLM
from hpcserve.errors import ConfigError
from tests.plan.cases import model, site, tp

from .cases import command, context, flags

PAIR = model(prefill=tp(4), decode=tp(4))


def test_prefill_on_gpus() -> None:
    made = command(PAIR, site(), replica="prefill-1", nodes=2)
    assert made.argv == (
        "/opt/bin/python", "-m", "vllm.entrypoints.openai.api_server",
        "--model", "/models/llama",
        "--served-model-name", "llama",
        "--host", "10.0.0.1", "--port", "20001",
        "--middleware", "hpcserve.engines.vllm_guard.JobKeyGuard",
        "--disable-access-log-for-endpoints", "/health,/metrics",
        "--enable-prompt-tokens-details",
        "--tensor-parallel-size", "4",
        "--kv-transfer-config",
        '{"kv_connector":"NixlConnector","kv_role":"kv_producer","kv_buffer_device":"cuda",'
        '"kv_connector_extra_config":{"kv_lease_duration":30}}',
        "--kv-events-config",
        '{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"ipc:///tmp/job/kv.inproc",'
        '"replay_endpoint":"ipc:///tmp/job/kv-replay.inproc"}',
        "--shutdown-timeout", "15",
    )  # fmt: skip
    assert made.env == {
        "CUDA_VISIBLE_DEVICES": "4,5,6,7",
        "FLASHINFER_WORKSPACE_BASE": "/tmp/job",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/job/inductor",
        "TRITON_CACHE_DIR": "/tmp/job/triton",
        "VLLM_CACHE_ROOT": "/tmp/job/vllm",
        "VLLM_HOST_IP": "10.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "10.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": "20002",
        "VLLM_NO_USAGE_STATS": "1",
    }


def test_kv_blocks_that_cross_nvlink_lie_in_memory_that_can() -> None:
    flag = "--enable-cumem-allocator"
    assert flag not in command(PAIR, site(), replica="decode-0", nodes=2).argv
    assert flag in command(PAIR, site(), replica="decode-0", nodes=2, kv_over_nvlink=True).argv
    for given in (True, False):
        asked = replace(PAIR, engine_args={"enable_cumem_allocator": given})
        argv = command(asked, site(), replica="decode-0", nodes=2, kv_over_nvlink=True).argv
        assert [word for word in argv if "cumem" in word] == [
            flag if given else "--no-enable-cumem-allocator"
        ]


def test_decode_recomputes_blocks_that_do_not_arrive() -> None:
    argv = command(replace(PAIR, kv_lease=45), site(), replica="decode-0", nodes=2).argv
    assert json.loads(flags(argv)["--kv-transfer-config"] or "") == {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_consumer",
        "kv_buffer_device": "cuda",
        "kv_connector_extra_config": {"kv_lease_duration": 45},
        "kv_load_failure_policy": "recompute",
    }


def test_aggregated_has_no_transfer() -> None:
    made = command(model(), site(), replica="aggregated-0")
    assert "--kv-transfer-config" not in made.argv
    assert not [name for name in made.env if "SIDE_CHANNEL" in name]


def test_cpu() -> None:
    pair = model(prefill=RoleSpec(), decode=RoleSpec(), dtype="float32")
    made = command(pair, site(gpus=0), replica="decode-0", nodes=2, cpus=((2, 3), (4,)))
    assert flags(made.argv)["--dtype"] == "float32"
    assert json.loads(flags(made.argv)["--kv-transfer-config"] or "")["kv_buffer_device"] == "cpu"
    assert made.env["VLLM_TARGET_DEVICE"] == "cpu"
    assert made.env["VLLM_CPU_OMP_THREADS_BIND"] == "2,3|4"
    assert made.env["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert "CUDA_VISIBLE_DEVICES" not in made.env


def test_gpus_go_by_the_names_the_node_has_for_them() -> None:
    names = tuple(f"GPU-{letter}" for letter in "abcdefgh")
    made = command(PAIR, site(), replica="prefill-1", nodes=2, gpu_names=names)
    assert made.env["CUDA_VISIBLE_DEVICES"] == "GPU-e,GPU-f,GPU-g,GPU-h"


def test_a_replica_over_two_nodes() -> None:
    wide = model(aggregated=tp(8, pipeline_parallel=2))
    head = flags(command(wide, site(), replica="aggregated-0", nodes=2).argv)
    assert (head["--nnodes"], head["--node-rank"], head["--master-addr"]) == ("2", "0", "10.0.0.1")
    assert "--headless" not in head
    second = command(wide, site(), replica="aggregated-0", nodes=2, node=1)
    assert second.argv[2:6] == ("hpcserve.engines.vllm_headless", "--model", "/models/llama", "--headless")
    other = flags(second.argv)
    assert (other["--node-rank"], other["--master-addr"]) == ("1", "10.0.0.1")
    assert other["--master-port"] == head["--master-port"]
    assert "--port" not in other and "--middleware" not in other
    assert second.env["VLLM_HOST_IP"] == "10.0.0.2"
    same = {"--tensor-parallel-size", "--pipeline-parallel-size", "--nnodes", "--master-addr"}
    assert {flag: head[flag] for flag in same} == {flag: other[flag] for flag in same}


def test_data_parallel_ranks_over_two_nodes() -> None:
    spec = model(prefill=tp(4, data_parallel=4, expert_parallel=True), decode=tp(8))
    made = context(spec, site(), replica="prefill-0", nodes=3)
    assert VLLM().ports(made.replica) == {
        "http": 1, "side_channel": 4, "master": 1, "dp_rpc": 1,
    }  # fmt: skip
    found = flags(VLLM().command(made).argv)
    assert found["--data-parallel-size"] == "4"
    assert found["--data-parallel-address"] == "10.0.0.1"
    assert found["--data-parallel-rpc-port"] == made.ports["dp_rpc"]
    assert found["--enable-expert-parallel"] is None
    assert VLLM.shared_ports <= set(made.ports)
    # Experts' ranks: each node has an API for its own.
    second = command(spec, site(), replica="prefill-0", nodes=3, node=1)
    assert second.argv[2] == "vllm.entrypoints.openai.api_server"
    other = flags(second.argv)
    assert other["--host"] == "10.0.0.2"
    assert "--headless" not in other
    assert found["--data-parallel-hybrid-lb"] is other["--data-parallel-hybrid-lb"] is None
    assert [(each.rank, each.node, each.headers) for each in VLLM().routed_ranks(made.replica)] == [
        (rank, rank // 2, {"x-data-parallel-rank": str(rank % 2)}) for rank in range(4)
    ]


def test_without_experts_one_api_has_all_ranks() -> None:
    spec = model(aggregated=tp(4, data_parallel=4))
    made = context(spec, site(), replica="aggregated-0", nodes=2)
    assert "--data-parallel-hybrid-lb" not in flags(VLLM().command(made).argv)
    second = command(spec, site(), replica="aggregated-0", nodes=2, node=1)
    assert second.argv[2] == "hpcserve.engines.vllm_headless"
    assert [(each.rank, each.node, each.headers) for each in VLLM().routed_ranks(made.replica)] == [
        (rank, 0, {"x-data-parallel-rank": str(rank)}) for rank in range(4)
    ]
    assert VLLM().routed_ranks(context(model(), site(), replica="aggregated-0").replica) == ()


def transfer(made: EngineCommand) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(flags(made.argv)["--kv-transfer-config"] or "")
    return read


def test_kv_tiers_stand_behind_nixl() -> None:
    tiers = KvOffloadSpec(cpu_gib=64, disk_gib=500)
    spec = model(prefill=tp(8), decode=tp(4), kv_offload=tiers)
    for replica, role, share in (("prefill-0", "kv_producer", 64), ("decode-0", "kv_consumer", 32)):
        both = transfer(command(spec, site(), replica=replica, nodes=2))
        assert (both["kv_connector"], both["kv_role"]) == ("MultiConnector", role)
        assert both["kv_load_failure_policy"] == "recompute"
        nixl, kept = both["kv_connector_extra_config"]["connectors"]
        assert (nixl["kv_connector"], nixl["kv_role"]) == ("NixlConnector", role)
        assert (kept["kv_connector"], kept["kv_role"]) == ("OffloadingConnector", "kv_both")
        extra = kept["kv_connector_extra_config"]
        assert extra["cpu_bytes_to_use"] == share << 30
        assert extra["self_describing_kv_events"] is True
        assert extra["secondary_tiers"][0]["root_dir"] == "/tmp/job/kv-blocks"
        # vLLM adds a rank's number to the outer one's name, and gives it to both inner ones.
        assert both["engine_id"] == "$START" and "engine_id" not in nixl and "engine_id" not in kept
    made = context(spec, site(), replica="decode-0", nodes=2)
    assert VLLM().disk_tier(made) == ("/tmp/job/kv-blocks", 250 << 30)


def test_processes_of_one_rank_have_one_name() -> None:
    def names(spec: ModelSpec, nodes: int) -> list[str | None]:
        replica = context(spec, site(), replica="prefill-0", nodes=nodes + 1).replica
        return [
            transfer(
                command(
                    spec, site(), replica="prefill-0", nodes=nodes + 1, node=place, start="prefill-0-3-ab"
                )
            ).get("engine_id")
            for place in range(len(replica.nodes))
        ]

    wide = model(prefill=tp(16), decode=tp(8))
    assert names(wide, 2) == ["prefill-0-3-ab"] * 2
    assert names(replace(wide, kv_offload=KvOffloadSpec(cpu_gib=64)), 2) == ["prefill-0-3-ab"] * 2
    # vLLM appends the rank where its scheduler is, and nowhere else.
    ranks = names(model(prefill=tp(16, data_parallel=2), decode=tp(8)), 4)
    assert ranks == ["prefill-0-3-ab", "prefill-0-3-ab_dp0", "prefill-0-3-ab", "prefill-0-3-ab_dp1"]
    # Of ranks on one node each, all processes have one parent.
    assert names(model(prefill=tp(8, data_parallel=2), decode=tp(8)), 2) == [None, None]


@pytest.mark.parametrize(
    ("size", "nodes", "node", "ranks"),
    [
        (tp(8), 1, 0, [""]),
        (tp(16), 2, 1, [""]),
        (tp(2, data_parallel=4), 1, 0, ["_dp0", "_dp1", "_dp2", "_dp3"]),
        (tp(4, data_parallel=4, expert_parallel=True), 2, 1, ["_dp2", "_dp3"]),
        # A rank of two nodes has its first one's name on both.
        (tp(16, data_parallel=2), 4, 1, ["_dp0"]),
        (tp(16, data_parallel=2), 4, 2, ["_dp1"]),
    ],
)
def test_the_memory_that_a_killed_engine_leaves_has_a_name(
    size: RoleSpec, nodes: int, node: int, ranks: list[str]
) -> None:
    spec = model(aggregated=size, kv_offload=KvOffloadSpec(cpu_gib=64))
    made = context(spec, site(), replica="aggregated-0", nodes=nodes, node=node, start="aggregated-0-3-ab")
    assert transfer(VLLM().command(made))["engine_id"].removesuffix(ranks[0]) == "aggregated-0-3-ab"
    assert VLLM().shared_memory(made) == tuple(f"vllm_offload_aggregated-0-3-ab{rank}.mmap" for rank in ranks)


def test_without_kv_tiers_engines_name_themselves() -> None:
    assert "engine_id" not in transfer(command(PAIR, site(), replica="decode-0", nodes=2))
    assert VLLM().shared_memory(context(PAIR, site(), replica="decode-0", nodes=2)) == ()


def test_kv_tiers_of_an_engine_without_a_partner() -> None:
    alone = transfer(command(model(kv_offload=KvOffloadSpec(cpu_gib=64)), site(), replica="aggregated-0"))
    assert alone["kv_connector"] == "OffloadingConnector"
    assert "spec_name" not in alone["kv_connector_extra_config"]
    on_cpu = model(kv_offload=KvOffloadSpec(cpu_gib=64), device="cpu")
    extra = transfer(command(on_cpu, site(gpus=0), replica="aggregated-0"))["kv_connector_extra_config"]
    assert extra["spec_module_path"] == "hpcserve.engines.vllm_offload"
    assert extra["spec_name"] == "HostOffloadingSpec"
    assert "offload_prompt_only" not in extra


def shared_tier(spec: ModelSpec, replica: str = "aggregated-0", **more: Any) -> dict[str, Any]:
    at = replace(site(), storage=StorageSite(kv="/lustre/me/kv"))
    made = transfer(command(spec, at, replica=replica, run_dir="/runs/llama", **more))
    if made["kv_connector"] == "MultiConnector":
        made = made["kv_connector_extra_config"]["connectors"][1]
    extra = made["kv_connector_extra_config"]
    assert (extra["spec_name"], extra["tokens_per_file"]) == ("FileTiersSpec", 256)
    (tier,) = extra["secondary_tiers"]
    return {**tier, "prompts": extra.get("offload_prompt_only", True)}


def test_kv_blocks_in_a_shared_directory() -> None:
    kept = KvOffloadSpec(cpu_gib=64, shared_gib=500)
    pair = model(prefill=tp(8), decode=tp(8), kv_offload=kept, revision="abc")
    prefill, decode = (shared_tier(pair, replica, nodes=2) for replica in ("prefill-0", "decode-0"))
    # What one of them writes the other one finds.
    assert prefill == decode
    assert (prefill["type"], prefill["directory"]) == ("SharedFiles", "/lustre/me/kv")
    assert (prefill["room"], prefill["revision"]) == ("/runs/llama/kv-room.json", "abc")
    assert prefill["prompts"] is True
    answers = model(kv_offload=replace(kept, answers=True))
    assert shared_tier(answers)["prompts"] is False


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({"engine_args": {"max-num-seqs": 8, "gpu_memory_utilization": 0.8}}, True),
        ({"engine_args": {"kv-cache-dtype": "fp8"}}, False),
        ({"engine_args": {"block_size": 64}}, False),
        ({"quantization": "fp8"}, False),
        ({"dtype": "float16"}, False),
        ({"max_model_len": 8192}, False),
        ({"env": {"VLLM_KV_CACHE_LAYOUT": "HND"}}, False),
        ({"aggregated": tp(8, engine_args={"hf-overrides": {"rope_theta": 1}})}, False),
    ],
)
def test_runs_share_kv_blocks_only_where_settings_can_not_change_them(
    other: dict[str, Any], same: bool
) -> None:
    kept = KvOffloadSpec(cpu_gib=64, shared_gib=500)
    ours = shared_tier(model(aggregated=tp(8), kv_offload=kept))
    theirs = shared_tier(model(**{"aggregated": tp(8), "kv_offload": kept, **other}))
    assert (ours["settings"] == theirs["settings"]) is same


def test_top_level_keys_become_flags() -> None:
    spec = model(revision="abc", dtype="bfloat16", quantization="fp8", max_model_len=4096, served_name="m")
    found = flags(command(spec, site(), replica="aggregated-0").argv)
    assert found["--revision"] == "abc"
    assert found["--dtype"] == "bfloat16"
    assert found["--quantization"] == "fp8"
    assert found["--max-model-len"] == "4096"
    assert found["--served-model-name"] == "m"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (True, ["--x-y"]),
        (False, ["--no-x-y"]),
        (256, ["--x-y", "256"]),
        (0.9, ["--x-y", "0.9"]),
        (-1, ["--x-y=-1"]),
        ("auto", ["--x-y", "auto"]),
        ({"a": {"b": 1}}, ["--x-y", '{"a":{"b":1}}']),
        (["a", 1], ["--x-y", "a", "1"]),
        ([{"a": 1}], ["--x-y", '{"a":1}']),
        (None, []),
    ],
)
@pytest.mark.parametrize("name", ["x-y", "x_y"])
def test_engine_args_become_flags(name: str, value: Any, words: list[str]) -> None:
    argv = command(model(engine_args={name: value}), site(), replica="aggregated-0").argv
    end = argv.index("--shutdown-timeout") + 2
    assert list(argv[end:]) == words


def test_engine_args_of_the_pool_win_and_can_unset() -> None:
    spec = model(
        engine_args={"max_num_seqs": 64, "enforce-eager": True, "block-size": 32},
        prefill=tp(4, engine_args={"max-num-seqs": 8, "enforce_eager": None}),
        decode=tp(4),
    )
    prefill = command(spec, site(), replica="prefill-0", nodes=2).argv
    decode = command(spec, site(), replica="decode-0", nodes=2).argv
    assert flags(prefill)["--max-num-seqs"] == "8"
    assert "--enforce-eager" not in prefill
    assert flags(decode)["--max-num-seqs"] == "64"
    assert "--enforce-eager" in decode
    assert flags(prefill)["--block-size"] == "32"


@pytest.mark.parametrize("flag", sorted(RESERVED))
def test_flags_that_hpcserve_sets_are_refused(flag: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command(model(engine_args={flag: "x"}), site(), replica="aggregated-0")
    assert caught.value.message == f"engine_args.{flag}: hpcserve sets `--{flag}` of vLLM itself"
    assert caught.value.hint == RESERVED[flag]


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("--port", "port"),
        ("api_key", "api-key"),
        ("kv_transfer_config.kv_role", "kv-transfer-config"),
        ("no-enable-expert-parallel", "enable-expert-parallel"),
        ("served-model", "served-model-name"),
    ],
)
def test_other_spellings_are_refused_too(name: str, flag: str) -> None:
    spec = model(prefill=tp(4, engine_args={name: "x"}), decode=tp(4))
    with pytest.raises(ConfigError, match=rf"^prefill\.engine_args\.{name}: hpcserve sets `--{flag}`"):
        command(spec, site(), replica="prefill-0", nodes=2)


@pytest.mark.parametrize("name", ["VLLM_API_KEY", "CUDA_VISIBLE_DEVICES", "VLLM_NIXL_SIDE_CHANNEL_PORT"])
def test_variables_that_hpcserve_sets_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^env\.{name}: "):
        command(model(env={name: "x"}), site(), replica="aggregated-0")


def test_environment_from_the_vague_to_the_certain() -> None:
    here = replace(
        site(network="ethernet"),
        network=NetworkSite(kind="infiniband", env={"B": "site", "C": "site", "D": "site"}),
        node=NodeSite(gpus=8, internet=True),
    )
    spec = model(env={"C": "model", "D": "model"}, aggregated=RoleSpec(env={"D": "pool"}))
    found = {"A": "node", "B": "node"}
    env = command(spec, here, replica="aggregated-0", fabric_env=found).env
    assert [env[name] for name in "ABCD"] == ["node", "site", "model", "pool"]
    assert "HF_HUB_OFFLINE" not in env


def test_no_secret_is_in_the_command() -> None:
    made = command(PAIR, site(), replica="prefill-0", nodes=2)
    assert VLLM.key_variable not in made.env
    assert not [word for word in made.argv if "api-key" in word]
