"""SGLang's command line and environment by role and size; SGLang reads them in `test_sglang_parser.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpcserve.config.model import ModelSpec, RoleSpec
from hpcserve.engines.kv_events.endpoints import EventEndpoint
from hpcserve.engines.sglang import CPU_KV_TOKENS, DIST_PORTS, RESERVED, SGLang
from hpcserve.engines.sglang_host_kv import VARIABLE
from hpcserve.errors import ConfigError, PlanError
from tests.plan.cases import model, site, tp

from .cases import command, context, flags

PAIR = model(engine="sglang", prefill=tp(4), decode=tp(4))
WIDE = model(engine="sglang", prefill=tp(4, data_parallel=4, expert_parallel=True), decode=tp(8))


def alone(**spec: object) -> ModelSpec:
    return model(engine="sglang", **spec)


def test_prefill_on_gpus() -> None:
    made = command(PAIR, site(), replica="prefill-1", nodes=2)
    assert made.argv == (
        "/opt/bin/python", "-m", "hpcserve.engines.sglang_server",
        "--model-path", "/models/llama",
        "--served-model-name", "llama",
        "--host", "10.0.0.1", "--port", "20002",
        "--tp-size", "4",
        "--nccl-port", "20003",
        "--disaggregation-mode", "prefill",
        "--disaggregation-transfer-backend", "nixl",
        "--disaggregation-bootstrap-port", "20001",
        "--enable-metrics",
        "--enable-cache-report",
        "--uvicorn-access-log-exclude-prefixes", "/ready", "/metrics",
        "--kv-events-config",
        '{"publisher":"zmq","endpoint":"ipc:///tmp/job/kv.inproc",'
        '"replay_endpoint":"ipc:///tmp/job/kv-replay.inproc"}',
    )  # fmt: skip
    assert made.env == {
        "CUDA_VISIBLE_DEVICES": "4,5,6,7",
        "FLASHINFER_WORKSPACE_BASE": "/tmp/job",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "SGLANG_CACHE_DIR": "/tmp/job/sglang",
        "SGLANG_HOST_IP": "10.0.0.1",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/job/inductor",
        "TRITON_CACHE_DIR": "/tmp/job/triton",
    }


def test_decode_meets_and_publishes_nothing() -> None:
    argv = command(PAIR, site(), replica="decode-0", nodes=2).argv
    assert flags(argv)["--disaggregation-mode"] == "decode"
    assert not {"--disaggregation-bootstrap-port", "--kv-events-config"} & set(argv)


def test_aggregated_has_no_transfer() -> None:
    argv = command(alone(), site(), replica="aggregated-0").argv
    assert not [word for word in argv if word.startswith("--disaggregation")]


def test_a_pair_on_the_cpu_passes_kv_from_the_hosts_memory() -> None:
    pair = model(engine="sglang", prefill=RoleSpec(), decode=RoleSpec(engine_args={"max_total_tokens": 4096}))
    made = command(pair, site(gpus=0), replica="decode-0", nodes=2, cpus=((2, 3),))
    found = flags(made.argv)
    assert (found["--device"], found["--attention-backend"]) == ("cpu", "torch_native")
    assert found["--max-total-tokens"] == "4096" and "--disable-overlap-schedule" in found
    assert found["--disaggregation-decode-retraction-backup"] == "cpu_tensor"
    assert made.env[VARIABLE] == "1"
    prefill = flags(command(pair, site(gpus=0), replica="prefill-0", nodes=2).argv)
    assert prefill["--max-total-tokens"] == str(CPU_KV_TOKENS)
    assert "--disaggregation-decode-retraction-backup" not in prefill
    with pytest.raises(ConfigError, match=f"env.{VARIABLE}"):
        command(model(engine="sglang", env={VARIABLE: "1"}), site(gpus=0), replica="aggregated-0")


def test_an_engine_on_the_cpu_has_as_many_threads_as_cores_of_its_own() -> None:
    def threads(*cpus: tuple[int, ...], **env: str) -> tuple[str | None, str | None]:
        made = command(alone(env=env), site(gpus=0), replica="aggregated-0", cpus=cpus).env
        return made.get("SGLANG_CPU_OMP_THREADS_BIND"), made.get("OMP_NUM_THREADS")

    assert threads((2, 3)) == ("2,3", "2")
    assert threads((2, 3), OMP_NUM_THREADS="1") == ("2,3", "1")
    assert threads(()) == threads() == (None, None)


def test_ports() -> None:
    engine = SGLang()
    prefill = context(PAIR, site(), replica="prefill-0", nodes=2).replica
    assert engine.ports(prefill) == {"http": 1, "bootstrap": 1, "nccl": 1}
    decode = context(PAIR, site(), replica="decode-0", nodes=2).replica
    assert engine.ports(decode) == {"http": 1, "nccl": 1}
    wide = context(WIDE, site(), replica="prefill-0", nodes=3).replica
    assert engine.ports(wide) == {"http": 1, "bootstrap": 1, "dist": DIST_PORTS}
    assert engine.shared_ports <= set(engine.ports(wide))
    copies = context(alone(aggregated=tp(2, data_parallel=4)), site(), replica="aggregated-0").replica
    assert engine.ports(copies) == {"http": 1}


def test_a_replica_over_two_nodes() -> None:
    long = alone(aggregated=tp(8, pipeline_parallel=2))
    head = flags(command(long, site(), replica="aggregated-0", nodes=2).argv)
    second = command(long, site(), replica="aggregated-0", nodes=2, node=1)
    other = flags(second.argv)
    assert (head["--node-rank"], other["--node-rank"]) == ("0", "1")
    assert (head["--host"], other["--host"]) == ("10.0.0.1", "10.0.0.2")
    assert head["--dist-init-addr"] == other["--dist-init-addr"] == "10.0.0.1:20001"
    assert second.env["SGLANG_HOST_IP"] == "10.0.0.2"
    same = {"--tp-size", "--pp-size", "--nnodes"}
    assert {flag: head[flag] for flag in same} == {flag: other[flag] for flag in same}


def test_all_ranks_of_a_prefill_replica_announce_themselves_at_its_head() -> None:
    """With the same port on both nodes, as the agent takes it over from the head (`shared_ports`)."""
    head, second = (
        flags(command(WIDE, site(), replica="prefill-0", nodes=3, node=node).argv) for node in (0, 1)
    )
    name = "--disaggregation-bootstrap-port"
    assert head[name] == second[name]
    assert "bootstrap" in SGLang.shared_ports


def test_an_ipv6_head_is_in_brackets() -> None:
    long = alone(aggregated=tp(8, pipeline_parallel=2))
    made = command(long, site(), replica="aggregated-0", nodes=2, head_address="fd00::1")
    assert flags(made.argv)["--dist-init-addr"] == "[fd00::1]:20001"


@pytest.mark.parametrize(
    ("spec", "nodes", "sizes"),
    [
        (tp(2, data_parallel=4), 1, {"--tp-size": "2", "--dp-size": "4"}),
        (
            tp(2, data_parallel=4, expert_parallel=True), 1,
            {"--tp-size": "8", "--attn-dp-size": "4", "--ep-size": "8"},
        ),
        (tp(8, data_parallel=2), 2, {"--tp-size": "16", "--attn-dp-size": "2"}),
        (tp(8, expert_parallel=True), 1, {"--tp-size": "8", "--ep-size": "8"}),
    ],
)  # fmt: skip
def test_data_and_expert_parallel(spec: RoleSpec, nodes: int, sizes: dict[str, str]) -> None:
    """Copies of a model on one node only, with experts of their own; otherwise just attention is apart."""
    found = flags(command(alone(aggregated=spec), site(), replica="aggregated-0", nodes=nodes).argv)
    names = ("--tp-size", "--dp-size", "--attn-dp-size", "--ep-size")
    assert {name: found[name] for name in names if name in found} == sizes


def test_each_rank_publishes_where_its_scheduler_is() -> None:
    def endpoints(spec: RoleSpec, node: int) -> list[str]:
        made = context(alone(aggregated=spec), site(), replica="aggregated-0", nodes=2, node=node)
        return [each.events for each in SGLang().kv_event_endpoints(made)]

    first, second = "ipc:///tmp/job/kv.inproc", "ipc:///tmp/job/kv.inproc_dp1"
    assert endpoints(tp(8, data_parallel=2), 0) == [first]
    assert endpoints(tp(8, data_parallel=2), 1) == [second]
    assert endpoints(tp(8, pipeline_parallel=2), 0) == [first]
    assert endpoints(tp(8, pipeline_parallel=2), 1) == []


def test_decode_publishes_where_it_keeps_prefixes() -> None:
    kept = replace(PAIR, engine_args={"disaggregation-decode-enable-radix-cache": True})
    made = context(kept, site(), replica="decode-0", nodes=2)
    assert SGLang().kv_event_endpoints(made) == (
        EventEndpoint(events="ipc:///tmp/job/kv.inproc", replay="ipc:///tmp/job/kv-replay.inproc"),
    )
    assert "--kv-events-config" in SGLang().command(made).argv


def test_own_events_stay_as_they_are() -> None:
    own = alone(engine_args={"kv-events-config": {"publisher": "null"}})
    made = context(own, site(), replica="aggregated-0")
    assert SGLang().kv_event_endpoints(made) == ()
    assert flags(SGLang().command(made).argv)["--kv-events-config"] == '{"publisher":"null"}'


@pytest.mark.parametrize("flag", [*RESERVED, "dp", "tp", "model", "disaggregation_mode", "no-enable-metrics"])
def test_flags_that_hpcserve_sets_are_refused_with_a_hint(flag: str) -> None:
    with pytest.raises(ConfigError, match=r"engine_args\..*hpcserve sets") as caught:
        command(alone(engine_args={flag: "x"}), site(), replica="aggregated-0")
    assert caught.value.hint


@pytest.mark.parametrize(
    "name", ["SGLANG_API_KEY", "SGLANG_RUST_SERVER", "SGLANG_GRPC_PORT", "SGLANG_HOST_IP"]
)
def test_variables_that_hpcserve_sets_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"env.{name}"):
        command(alone(env={name: "1"}), site(), replica="aggregated-0")


def test_decode_has_the_pipeline_stages_of_prefill_or_none() -> None:
    both = model(engine="sglang", prefill=tp(4, pipeline_parallel=2), decode=tp(4, pipeline_parallel=2))
    assert flags(command(both, site(), replica="decode-0", nodes=2).argv)["--pp-size"] == "2"
    more = model(engine="sglang", prefill=tp(4), decode=tp(4, pipeline_parallel=2))
    with pytest.raises(PlanError, match="SGLang's NIXL connector"):
        command(more, site(), replica="decode-0", nodes=2)
