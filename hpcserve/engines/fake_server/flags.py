"""The command line: vLLM's names where vLLM has the flag."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .failures import MODES, Failures, parse_spec
from .language import LANGUAGES

KEY_VARIABLE = "FAKE_ENGINE_API_KEY"
DIALECTS = ("vllm", "sglang", "tensorrt-llm")
ROLES = ("prefill", "decode", "aggregated")
_DEFAULT_KV_BLOCKS = 4096
_LONGEST_DEFAULT_MODEL_LEN = 32768


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """How this server runs. Times are in seconds except where a name says ms."""

    model: str
    served_model_names: tuple[str, ...]
    host: str
    port: int
    dialect: str
    role: str
    bootstrap_port: int | None
    """Of prefill engines in SGLang's dialect."""
    bootstrap_timeout: float
    side_channel_port: int | None
    """Of the first data-parallel rank; the next ones' follow."""
    data_parallel_size: int
    kv_events: str | None
    """ZMQ address to bind for the first rank; None publishes nothing."""
    kv_replay: str | None
    kv_lease: float
    kv_load_failure_policy: str
    kv_bytes_per_token: int
    kv_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    prefill_tokens_per_second: float
    itl_ms: float
    itl_ms_per_seq: float
    start_delay: float
    shutdown_timeout: float
    stream_interval: int
    enable_prompt_tokens_details: bool
    speech: str
    failures: tuple[Mapping[str, Any], ...]
    api_key: str | None

    @property
    def served_name(self) -> str:
        return self.served_model_names[0]

    @property
    def disaggregated(self) -> bool:
        return self.role != "aggregated"


def parse(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> Flags:
    """Flags from a command line; a wrong one ends the process with status 2 and a sentence."""
    parser = _parser()
    args = vars(parser.parse_args(argv))
    if args["kv_blocks"] is None:
        # Room for the longest request, as on a GPU that was chosen for the model.
        args["kv_blocks"] = max(_DEFAULT_KV_BLOCKS, -(-(args["max_model_len"] or 0) // args["block_size"]))
    longest = args["kv_blocks"] * args["block_size"]
    if args["max_model_len"] is None:
        args["max_model_len"] = min(_LONGEST_DEFAULT_MODEL_LEN, longest)
    elif args["max_model_len"] > longest:
        parser.error(
            f"--max-model-len {args['max_model_len']} is larger than the maximum number of tokens"
            f" that can be stored in KV cache ({longest})"
        )
    if args["data_parallel_size"] > 1 and args["dialect"] != "vllm":
        parser.error("--data-parallel-size is for --dialect vllm")
    if args["dialect"] != "vllm":
        # The others' decode engines compute no prompt whose KV does not come.
        args["kv_load_failure_policy"] = "fail"
    if args["dialect"] == "sglang":
        if args["role"] == "prefill" and args["bootstrap_port"] is None:
            parser.error("--role prefill needs --bootstrap-port")
    elif args["role"] != "aggregated" and args["side_channel_port"] is None:
        parser.error(f"--role {args['role']} needs --side-channel-port")
    args["kv_events"], args["kv_replay"] = _events(parser, args.pop("kv_events_config"))
    args["failures"] = tuple(_failure(parser, spec) for spec in args.pop("fail"))
    args["served_model_names"] = tuple(args.pop("served_model_name") or (args["model"],))
    args["api_key"] = environ.get(KEY_VARIABLE) or None
    return Flags(**args)


def _events(parser: argparse.ArgumentParser, text: str | None) -> tuple[str | None, str | None]:
    """Addresses of events and of replay, with vLLM's defaults."""
    if text is None:
        return None, None
    try:
        config = json.loads(text)
        enabled = config.get("enable_kv_cache_events", False)
        given = config.get("endpoint", "tcp://*:5557"), config.get("replay_endpoint")
    except (ValueError, AttributeError) as error:
        parser.error(f"--kv-events-config {text}: not a JSON object: {error}")
    return given if enabled else (None, None)


def _failure(parser: argparse.ArgumentParser, spec: str) -> Mapping[str, Any]:
    try:
        command = parse_spec(spec)
        if command["mode"] != "crash":
            Failures().apply(command)
    except ValueError as error:
        parser.error(f"--fail {spec}: {error}")
    return command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hpcserve.engines.fake_server",
        description="A server that behaves like vLLM without a model.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="path or hub id; must be the same text on all replicas of a job")
    add("--served-model-name", nargs="+", help="names in requests (default: --model)")
    add("--host", default="127.0.0.1")
    add("--port", type=_port, default=8000, help="0 lets the system choose; the log says which")
    add("--role", choices=ROLES, default="aggregated")
    add("--dialect", choices=DIALECTS, default="vllm", help="whose protocols it speaks")
    add("--bootstrap-port", type=_port, help="sglang: where decode meets this prefill engine")
    add(
        "--bootstrap-timeout",
        type=_seconds,
        default=300.0,
        help="sglang: how long one waits for the other (s)",
    )
    add("--side-channel-port", type=_port, help="where KV blocks are pulled from")
    add("--data-parallel-size", type=_count, default=1, help="engines behind this server")
    add(
        "--kv-events-config",
        metavar="JSON",
        help="as vLLM's: enable_kv_cache_events, endpoint, replay_endpoint",
    )
    add("--kv-lease", type=_seconds, default=30.0, help="how long prefill keeps blocks for decode (s)")
    add("--kv-load-failure-policy", choices=("recompute", "fail"), default="recompute")
    add("--kv-bytes-per-token", type=_count, default=1024)
    add("--kv-blocks", type=_count, help=f"default: {_DEFAULT_KV_BLOCKS}, or what --max-model-len needs")
    add("--block-size", type=_count, default=16)
    add("--max-num-seqs", type=_count, default=256)
    add("--max-num-batched-tokens", type=_count, default=2048)
    add("--max-model-len", type=_count)
    add("--prefill-tokens-per-second", type=_rate, default=200_000.0)
    add("--itl-ms", type=_seconds, default=5.0, help="time of a decode step (ms)")
    add("--itl-ms-per-seq", type=_seconds, default=0.0, help="more time of a decode step per sequence (ms)")
    add("--start-delay", type=_seconds, default=0.0, help="time to load the model (s)")
    add("--shutdown-timeout", type=_seconds, default=0.0, help="time to finish requests after SIGTERM (s)")
    add("--stream-interval", type=_count, default=1, help="tokens in one event of a stream")
    add("--enable-prompt-tokens-details", action="store_true", help="tell cached tokens in `usage`")
    add("--speech", choices=LANGUAGES, default="words", help="emoji: each character is two tokens")
    add("--fail", action="append", default=[], metavar="MODE[:KEY=VALUE,…]", help=", ".join(MODES))
    return parser


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError("a port is 0 to 65535")
    return port


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("must not be negative")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return value
