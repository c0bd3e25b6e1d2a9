"""The bodies of both legs, as SGLang wants them, and what its metrics say of the KV that passed."""

from __future__ import annotations

from hpcserve import engines

SGLANG = engines.get("sglang")
BODY = {
    "model": "m", "prompt": "x", "max_tokens": 9, "temperature": 0.5, "logprobs": 1, "stream": True,
    "stream_options": {"include_usage": True},
}  # fmt: skip


def test_both_get_the_request_and_the_meeting_place() -> None:
    prefill, decode = SGLANG.pair_requests(
        BODY, url="http://10.0.0.1:3000", ports={"bootstrap": 8998, "http": 1}
    )
    meeting = {name: decode[name] for name in decode if name.startswith("bootstrap_")}
    assert (meeting.pop("bootstrap_host"), meeting.pop("bootstrap_port")) == ("10.0.0.1", 8998)
    (room,) = meeting.values()
    assert 0 <= room < 2**63
    assert {name: value for name, value in decode.items() if name in BODY} == BODY
    # Prefill samples the first token for both, so it must know all but how the client wants to be told.
    assert prefill == {
        name: value for name, value in decode.items() if name not in ("stream", "stream_options")
    }


def test_rooms_are_not_used_twice() -> None:
    rooms = {SGLANG.pair_requests({}, url="http://h:1", ports={})[0]["bootstrap_room"] for _ in range(1000)}
    assert len(rooms) == 1000


def test_an_ipv6_address_has_no_brackets_and_an_unknown_port_is_left_to_decode() -> None:
    prefill, _ = SGLANG.pair_requests({}, url="http://[fd00::1]:3000", ports={})
    assert (prefill["bootstrap_host"], prefill["bootstrap_port"]) == ("fd00::1", None)


def test_bytes_are_those_that_prefill_counts_over_its_ranks() -> None:
    text = (
        "# HELP sglang:kv_transfer_total_mb Histogram of KV cache transfer size in MB.\n"
        'sglang:kv_transfer_total_mb_sum{tp_rank="0",dp_rank="0"} 1.5\n'
        'sglang:kv_transfer_total_mb_sum{tp_rank="0",dp_rank="1"} 0.5\n'
        'sglang:kv_transfer_total_mb_count{tp_rank="0"} 7.0\n'
    )
    assert SGLANG.kv_counted_by == "prefill"
    assert SGLANG.kv_bytes_received(text) == 2 * 1024 * 1024
    # Before the first transfer the histogram has no samples.
    assert SGLANG.kv_bytes_received("sglang:num_running_reqs 0.0\n") == 0
    assert SGLANG.kv_bytes_received("up 1\n") is None


def test_what_a_pair_can_not_answer() -> None:
    assert SGLANG.pair_obstacle({"echo": True, "logprobs": 1}.get) == "`echo` with `logprobs`"
    for body in ({"echo": True}, {"logprobs": 1}, {"echo": True, "logprobs": 0}, {}):
        assert SGLANG.pair_obstacle(body.get) is None
