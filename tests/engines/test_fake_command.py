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


@pytest.mark.parametrize("flag", sorted(RESERVED))
def test_flags_that_hpcserve_sets_are_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"hpcserve sets `--{flag}` of the fake engine itself"):
        command(model(engine="fake", engine_args={flag: 1}), site(), replica="aggregated-0")


def test_unknown_engines_are_a_key_error() -> None:
    with pytest.raises(KeyError):
        engines.get("other")
