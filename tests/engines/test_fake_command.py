"""The fake engine's command line, and that its own parser takes it."""

from __future__ import annotations

import pytest

from hpcserve import engines
from hpcserve.config.model import RoleSpec
from hpcserve.engines.fake import RESERVED
from hpcserve.engines.fake_server.flags import KEY_VARIABLE, parse
from hpcserve.errors import ConfigError
from tests.plan.cases import model, site, tp

from .cases import command


def test_decode() -> None:
    spec = model(
        engine="fake", prefill=tp(4), decode=tp(4, env={"A": "1"}), kv_lease=60,
        engine_args={"itl-ms": 2, "fail": ["slow:after=3", "crash:after=9"]},
    )  # fmt: skip
    made = command(spec, site(), replica="decode-1", nodes=2)
    assert made.argv == (
        "/opt/bin/python", "-m", "hpcserve.engines.fake_server",
        "--model", "/models/llama", "--served-model-name", "llama", "--role", "decode",
        "--host", "10.0.0.2", "--port", "20001", "--side-channel-port", "20002",
        "--kv-lease", "60",
        "--kv-events-config",
        '{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"ipc:///tmp/job/kv.inproc",'
        '"replay_endpoint":"ipc:///tmp/job/kv-replay.inproc"}',
        "--enable-prompt-tokens-details", "--shutdown-timeout", "15",
        "--itl-ms", "2", "--fail", "slow:after=3", "--fail", "crash:after=9",
    )  # fmt: skip
    assert made.env == {"PYTHONUNBUFFERED": "1", "A": "1"}


@pytest.mark.parametrize("replica", ["prefill-0", "decode-0", "aggregated-0"])
def test_its_parser_takes_the_command(replica: str) -> None:
    pool = {"aggregated": RoleSpec()} if replica.startswith("agg") else {"prefill": RoleSpec()}
    spec = model(
        engine="fake", max_model_len=2048, engine_args={"start_delay": 0.5, "kv-blocks": 512}, **pool
    )
    argv = command(spec, site(gpus=0), replica=replica).argv
    read = parse(argv[3:], {KEY_VARIABLE: "k"})
    assert (read.role, read.max_model_len, read.start_delay, read.api_key) == (replica[:-2], 2048, 0.5, "k")
    assert engines.get("fake").key_variable == KEY_VARIABLE


@pytest.mark.parametrize("dialect", ["sglang", "tensorrt-llm"])
@pytest.mark.parametrize("replica", ["prefill-0", "decode-0"])
def test_a_run_speaks_the_dialect_of_its_engine_args(dialect: str, replica: str) -> None:
    spec = model(engine="fake", engine_args={"dialect": dialect, "itl_ms": 2}, prefill=RoleSpec())
    engine = engines.of(spec)
    like = engines.get(dialect)
    assert (engine.paired, engine.health_path, engine.kv_counted_by, engine.router_members) == (
        like.paired, like.health_path, like.kv_counted_by, like.router_members,
    )  # fmt: skip
    # The router gets the same one by its name.
    assert type(engines.get(engine.name)) is type(engine) and engine.key_variable == KEY_VARIABLE
    argv = command(spec, site(gpus=0), replica=replica).argv
    read = parse(argv[3:], {KEY_VARIABLE: "k"})
    assert (read.dialect, read.role) == (dialect, replica[:-2])
    meets = dialect == "sglang"
    assert (read.bootstrap_port is not None) == (meets and replica == "prefill-0")
    assert (read.side_channel_port is not None) == (not meets)
    assert (read.kv_events is not None) == (meets and replica == "prefill-0")


def test_a_dialect_that_does_not_exist_and_one_of_a_pool_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"engine_args\.dialect must be one of vllm, sglang, tensorrt-llm, not 'x'"
    ):
        engines.of(model(engine="fake", engine_args={"dialect": "x"}))
    pool = RoleSpec(engine_args={"dialect": "sglang"})
    with pytest.raises(
        ConfigError, match=r"prefill\.engine_args\.dialect: all replicas of a run speak one dialect"
    ):
        command(model(engine="fake", prefill=pool), site(gpus=0), replica="prefill-0")


@pytest.mark.parametrize("flag", sorted(RESERVED))
def test_flags_that_hpcserve_sets_are_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"hpcserve sets `--{flag}` of the fake engine itself"):
        command(model(engine="fake", engine_args={flag: 1}), site(), replica="aggregated-0")


def test_unknown_engines_are_a_key_error() -> None:
    with pytest.raises(KeyError):
        engines.get("other")
