"""The fake engine in SGLang's dialect: prefill and decode meet in a room, or say why they did not."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from hpcserve.engines.fake_server.side_channel import frame_bytes

from .running import FakeEngine, wait_until

PROMPT = "the quick brown fox jumps over the lazy dog and thinks about it for quite a while longer"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Pair:
    def __init__(self, folder: Path, **flags: str) -> None:
        self.port = free_port()
        more = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
        sglang = ("--dialect", "sglang", *more)
        self.prefill = FakeEngine(
            folder / "prefill", *sglang, "--role", "prefill", "--bootstrap-port", str(self.port)
        )
        self.decode = FakeEngine(folder / "decode", *sglang, "--role", "decode")
        # Both listen.
        assert self.prefill.url and self.decode.url

    def body(self, room: int, **fields: Any) -> dict[str, Any]:
        meeting = {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.port, "bootstrap_room": room}
        return {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, **fields, **meeting}

    def ask(self, room: int, **fields: Any) -> list[requests.Response]:
        body = self.body(room, **fields)
        with ThreadPoolExecutor(2) as both:
            return list(
                both.map(lambda engine: engine.post("/v1/completions", body), (self.prefill, self.decode))
            )

    def stop(self) -> None:
        for engine in (self.prefill, self.decode):
            engine.stop()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    running = Pair(tmp_path)
    yield running
    running.stop()


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[Pair]:
    running = Pair(tmp_path, bootstrap_timeout="0.3")
    yield running
    running.stop()


def text(response: requests.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def told(response: requests.Response, status: int) -> str:
    """SGLang's errors are members of the body itself."""
    body = response.json()
    assert (response.status_code, body["object"], body["code"]) == (status, "error", status)
    return str(body["message"])


def test_a_pair_answers_as_one_engine_does_and_prefill_counts_the_bytes(pair: Pair, tmp_path: Path) -> None:
    alone = FakeEngine(tmp_path / "alone", "--dialect", "sglang")
    try:
        for room in range(3):
            prefill, decode = pair.ask(room, prompt=f"{room} {PROMPT}")
            assert text(decode) == alone.text(f"{room} {PROMPT}", max_tokens=8, temperature=0)
            assert prefill.json()["usage"]["completion_tokens"] == 1
    finally:
        alone.stop()
    assert pair.prefill.metric("sglang:kv_transfer_total_mb_sum") > 0
    assert pair.decode.metric("sglang:kv_transfer_total_mb_sum") == 0
    assert "vllm:" not in pair.decode.get("/metrics").text


def test_decode_may_be_asked_first(pair: Pair) -> None:
    with ThreadPoolExecutor(1) as first:
        waiting = first.submit(pair.decode.post, "/v1/completions", pair.body(7))
        wait_until(lambda: pair.decode.metric("sglang:num_queue_reqs"), "decode to wait")
        assert pair.prefill.post("/v1/completions", pair.body(7)).status_code == 200
        assert text(waiting.result())


def test_ready(pair: Pair) -> None:
    assert pair.prefill.get("/ready").status_code == 200


def test_without_a_room_both_refuse(pair: Pair) -> None:
    for engine in (pair.prefill, pair.decode):
        response = engine.post("/v1/completions", {"prompt": PROMPT})
        assert "without bootstrap room id" in told(response, 400)


def test_prefill_gives_up_on_a_partner_that_does_not_come(hasty: Pair) -> None:
    said = told(hasty.prefill.post("/v1/completions", hasty.body(5)), 500)
    assert said.startswith("Prefill bootstrap failed for request rank=0 req.rid='cmpl-")
    assert said.endswith(
        "KVTransferError(bootstrap_room=5): Request 5 timed out after 0.3s in KVPoll.Bootstrapping"
    )


def test_decode_gives_up_on_a_prompt_that_does_not_come(hasty: Pair) -> None:
    said = told(hasty.decode.post("/v1/completions", hasty.body(6)), 500)
    assert said.startswith("Decode transfer failed for request rank=0 decode_req.req.rid='cmpl-")
    assert said.endswith("Request 6 timed out after 0.3s in KVPoll.WaitingForInput")


def test_decode_whose_prefill_is_gone_says_so_in_a_stream_as_well(pair: Pair) -> None:
    pair.prefill.stop()
    assert "Decode handshake failed" in told(pair.decode.post("/v1/completions", pair.body(1)), 500)
    stream = pair.decode.post("/v1/completions", pair.body(2, stream=True))
    event = stream.text.split("\n\n")[0]
    assert stream.status_code == 200 and event.startswith('data: {"error":{')
    assert "Decode handshake failed" in event


def test_prefill_killed_while_decode_waits(pair: Pair) -> None:
    with ThreadPoolExecutor(1) as first:
        waiting = first.submit(pair.decode.post, "/v1/completions", pair.body(3))
        wait_until(lambda: pair.decode.metric("sglang:num_queue_reqs"), "decode to wait")
        pair.prefill.stop()
        said = told(waiting.result(), 500)
    # It depends on how far decode was on its way there.
    assert re.fullmatch(
        r"Decode (handshake|transfer) failed for request .* \(?bootstrap_addr: 127.0.0.1:\d+\)?", said
    )
    assert pair.decode.metric("sglang:num_transfer_failed_reqs_total") == 1


def test_a_leg_that_is_abandoned_ends_the_other(pair: Pair) -> None:
    with ThreadPoolExecutor(1) as first:
        waiting = first.submit(pair.prefill.post, "/v1/completions", pair.body(4))
        wait_until(lambda: pair.prefill.metric("sglang:prompt_tokens_total"), "the prompt to be computed")
        with socket.create_connection(("127.0.0.1", pair.port)) as partner:
            partner.sendall(frame_bytes({"op": "join", "room": "4"}))
        said = told(waiting.result(), 500)
    assert said.startswith("Prefill transfer failed for request rank=0 req.rid='cmpl-")
