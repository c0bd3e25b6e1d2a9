"""Prefill on one engine, decode on another, with real bytes between two processes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest

from .conftest import Start
from .running import FakeEngine, wait_until

Port = Callable[[], int]
PROMPT = "a prompt that is long enough to fill several KV blocks of the prefill engine"
PREFILL_LEG = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class Pair:
    """A prefill and a decode engine."""

    def __init__(self, start: Start, free_port: Port) -> None:
        self._start = start
        self._port = free_port
        self.side_port = free_port()

    def prefill(self, *flags: str, model: str = "toy", name: str = "toy") -> FakeEngine:
        ports = ("--role", "prefill", "--side-channel-port", str(self.side_port))
        return self._start(*ports, "--served-model-name", name, *flags, model=model)

    def decode(self, *flags: str) -> FakeEngine:
        return self._start("--role", "decode", "--side-channel-port", str(self._port()), *flags)


@pytest.fixture
def pair(start: Start, free_port: Port) -> Pair:
    return Pair(start, free_port)


def first_leg(prefill: FakeEngine, prompt: Any = PROMPT) -> dict[str, Any]:
    """What the prefill engine tells the decode engine."""
    params = prefill.complete(prompt, max_tokens=1, kv_transfer_params=PREFILL_LEG)["kv_transfer_params"]
    assert isinstance(params, dict)
    return params


def second_leg(decode: FakeEngine, params: dict[str, Any], **fields: Any) -> str:
    return decode.text(PROMPT, **{"max_tokens": 12, "kv_transfer_params": params, **fields})


def tokens_in(engine: FakeEngine, text: str) -> int:
    return int(engine.post("/tokenize", {"prompt": text}).json()["count"])


def test_the_prefill_answer_says_where_its_blocks_are(pair: Pair) -> None:
    prefill = pair.prefill()
    params = first_leg(prefill)
    assert set(params) == {
        "do_remote_prefill", "do_remote_decode", "remote_block_ids", "remote_engine_id",
        "remote_request_id", "remote_host", "remote_port", "tp_size", "dcp_size", "pp_size",
        "remote_num_tokens", "remote_blocks_expiry_time", "transfer_mode",
    }  # fmt: skip
    count = tokens_in(prefill, PROMPT)
    assert params["do_remote_prefill"] is True
    assert params["remote_num_tokens"] == count
    assert [len(group) for group in params["remote_block_ids"]] == [-(-count // 16)]
    assert (params["remote_host"], params["remote_port"]) == ("127.0.0.1", pair.side_port)
    assert params["transfer_mode"] == "pull"


def test_the_answer_is_that_of_one_engine_and_the_bytes_are_counted(pair: Pair, engine: FakeEngine) -> None:
    prefill, decode = pair.prefill(), pair.decode()
    assert second_leg(decode, first_leg(prefill)) == engine.text(PROMPT, max_tokens=12)
    count = tokens_in(decode, PROMPT)
    assert decode.metric("vllm:nixl_bytes_transferred_sum") == count * 1024
    assert decode.metric("vllm:nixl_bytes_transferred_count") == 1
    assert decode.metric("vllm:external_prefix_cache_hits_total") == count
    assert decode.metric("vllm:prompt_tokens_by_source_total", source="external_kv_transfer") == count
    assert decode.metric("vllm:nixl_num_failed_transfers_total") == 0
    wait_until(lambda: prefill.metric("vllm:kv_cache_usage_perc") == 0, "prefill to free its blocks")


def test_chat_and_streams_work_across_the_pair(pair: Pair, engine: FakeEngine) -> None:
    prefill, decode = pair.prefill(), pair.decode()
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6}
    legs = {**body, "max_tokens": 1, "kv_transfer_params": PREFILL_LEG}
    params = prefill.post("/v1/chat/completions", legs).json()["kv_transfer_params"]
    both = {**body, "kv_transfer_params": params}
    content = engine.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert decode.post("/v1/chat/completions", both).json()["choices"][0]["message"]["content"] == content
    streamed = {"prompt": "x", "stream": True, "kv_transfer_params": PREFILL_LEG}
    stream = prefill.post("/v1/completions", streamed)
    assert "kv_transfer_params" not in stream.text


def test_only_what_decode_lacks_is_pulled(pair: Pair) -> None:
    prefill, decode = pair.prefill(), pair.decode()
    for _ in range(2):
        second_leg(decode, first_leg(prefill))
    count = tokens_in(decode, PROMPT)
    cached = (count - 1) // 16 * 16
    assert cached > 0
    assert decode.metric("vllm:nixl_bytes_transferred_sum") == (2 * count - cached) * 1024


def test_an_unclaimed_prefill_expires_and_decode_then_computes_it_itself(
    pair: Pair, engine: FakeEngine
) -> None:
    prefill, decode = pair.prefill("--kv-lease", "0.2"), pair.decode()
    params = first_leg(prefill)
    wait_until(lambda: prefill.metric("vllm:nixl_num_kv_expired_reqs_total") == 1, "the lease to end")
    assert prefill.metric("vllm:kv_cache_usage_perc") == 0
    assert second_leg(decode, params) == engine.text(PROMPT, max_tokens=12)
    assert decode.metric("vllm:nixl_num_failed_transfers_total") == 1


def test_heartbeats_keep_blocks_for_a_request_that_waits(pair: Pair) -> None:
    prefill = pair.prefill("--kv-lease", "3")
    decode = pair.decode("--kv-lease", "0.3", "--max-num-seqs", "1")
    assert prefill.url and decode.url
    busy = {"prompt": "busy", "max_tokens": 30_000, "stream": True}
    with decode.post("/v1/completions", busy, stream=True):
        params = first_leg(prefill)
        body = {"prompt": PROMPT, "max_tokens": 2, "stream": True, "kv_transfer_params": params}
        with decode.post("/v1/completions", body, stream=True) as waiting:
            first_leg(prefill, "another prompt, which nobody fetches")
            wait_until(
                lambda: prefill.metric("vllm:nixl_num_kv_expired_reqs_total") == 1, "the other lease to end"
            )
            assert prefill.metric("vllm:kv_cache_usage_perc") > 0
            assert decode.metric("vllm:num_requests_waiting") == 1
        # The client that waited has gone: prefill is told at once.
        wait_until(lambda: prefill.metric("vllm:kv_cache_usage_perc") == 0, "prefill to free its blocks")
    assert waiting.status_code == 200
    assert prefill.metric("vllm:nixl_num_kv_expired_reqs_total") == 1


def test_a_client_that_leaves_during_a_transfer_frees_both_sides(pair: Pair) -> None:
    prefill, decode = pair.prefill(), pair.decode()
    body = {"prompt": PROMPT, "stream": True, "kv_transfer_params": first_leg(prefill)}
    assert decode.url
    prefill.process.send_signal(signal.SIGSTOP)
    stage = "vllm:num_requests_kv_fetch_by_stage"
    with decode.post("/v1/completions", body, stream=True):
        wait_until(lambda: decode.metric(stage, stage="in_progress") == 1, "the transfer to begin")
    wait_until(lambda: decode.metric(stage, stage="in_progress") == 0, "the transfer to be given up")
    assert decode.metric("vllm:kv_cache_usage_perc") == 0
    prefill.process.send_signal(signal.SIGCONT)
    wait_until(lambda: prefill.metric("vllm:kv_cache_usage_perc") == 0, "prefill to free its blocks")
    assert prefill.metric("vllm:nixl_num_kv_expired_reqs_total") == 0


def test_a_refused_request_frees_the_blocks(pair: Pair) -> None:
    prefill, decode = pair.prefill(), pair.decode()
    body = {"prompt": PROMPT, "max_tokens": -1, "kv_transfer_params": first_leg(prefill)}
    assert decode.post("/v1/completions", body).status_code == 400
    wait_until(lambda: prefill.metric("vllm:kv_cache_usage_perc") == 0, "prefill to free its blocks")


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_dropped_transfer_is_recomputed(pair: Pair, engine: FakeEngine, side: str) -> None:
    engines = {"prefill": pair.prefill(), "decode": pair.decode()}
    engines[side].fail("drop_transfer", count=1)
    prefill, decode = engines["prefill"], engines["decode"]
    for _ in range(2):
        assert second_leg(decode, first_leg(prefill)) == engine.text(PROMPT, max_tokens=12)
    assert decode.metric("vllm:nixl_num_failed_transfers_total") == 1
    assert decode.metric("vllm:nixl_bytes_transferred_count") == 1


def test_policy_fail_answers_500_and_ends_streams_with_an_error(pair: Pair) -> None:
    prefill, decode = pair.prefill(), pair.decode("--kv-load-failure-policy", "fail")
    decode.fail("drop_transfer", count=2)
    body = {"prompt": PROMPT, "kv_transfer_params": first_leg(prefill)}
    response = decode.post("/v1/completions", body)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "InternalServerError"
    stream = decode.post("/v1/completions", {**body, "stream": True})
    assert '"code":500' in stream.text
    assert decode.metric("vllm:request_success_total", finished_reason="error") == 2


def test_a_restarted_prefill_engine_refuses_old_parameters(pair: Pair, engine: FakeEngine) -> None:
    before, decode = pair.prefill(), pair.decode()
    params = first_leg(before)
    before.stop()
    after = pair.prefill()
    assert first_leg(after)["remote_engine_id"] != params["remote_engine_id"]
    assert second_leg(decode, params) == engine.text(PROMPT, max_tokens=12)
    assert decode.metric("vllm:nixl_num_failed_transfers_total") == 1
    assert "engine id" in decode.output


def test_a_dead_prefill_engine_does_not_stop_decode(pair: Pair, engine: FakeEngine) -> None:
    prefill, decode = pair.prefill(), pair.decode()
    params = first_leg(prefill)
    prefill.stop()
    assert second_leg(decode, params) == engine.text(PROMPT, max_tokens=12)
    assert decode.metric("vllm:nixl_num_failed_transfers_total") == 1


def test_different_model_paths_are_not_compatible(pair: Pair) -> None:
    prefill = pair.prefill(model="/elsewhere/toy")
    decode = pair.decode()
    second_leg(decode, first_leg(prefill))
    assert "model paths or KV layouts differ" in decode.output
    assert decode.metric("vllm:nixl_num_failed_transfers_total") == 1


def test_bytes_of_another_prompt_are_noticed(pair: Pair) -> None:
    prefill, decode = pair.prefill(), pair.decode()
    other = PROMPT.replace("long", "dull")
    assert tokens_in(prefill, other) == tokens_in(prefill, PROMPT)
    second_leg(decode, first_leg(prefill, other))
    assert "wrong checksum" in decode.output
    assert decode.metric("vllm:nixl_num_failed_transfers_total") == 1


def test_parameters_without_coordinates_are_ignored_with_a_warning(pair: Pair, engine: FakeEngine) -> None:
    decode = pair.decode()
    assert second_leg(decode, {"do_remote_prefill": True}) == engine.text(PROMPT, max_tokens=12)
    assert "Got invalid KVTransferParams" in decode.output


def test_a_drain_waits_for_blocks_to_be_pulled(pair: Pair) -> None:
    prefill, decode = pair.prefill("--shutdown-timeout", "60"), pair.decode()
    params = first_leg(prefill)
    prefill.process.terminate()
    wait_until(lambda: "Shutting down" in prefill.output, "the drain to begin")
    assert prefill.process.poll() is None
    second_leg(decode, params)
    assert prefill.process.wait(60) == 0
    assert decode.metric("vllm:nixl_bytes_transferred_count") == 1
