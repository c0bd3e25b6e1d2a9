"""What is read from an engine's metrics, and how rates follow it."""

from __future__ import annotations

import pytest

from hpcserve.router.placement.facts import PREFILL_TOKENS_PER_S, EngineFacts, Rates

# As vLLM 0.32 writes them.
TEXT = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="toy"} 3.0
vllm:num_requests_running{engine="1",model_name="toy"} 4.0
vllm:num_requests_waiting{engine="0",model_name="toy"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="toy"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="toy"} 0.5
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000",num_cpu_blocks="0"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="1000",num_cpu_blocks="0"} 1.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="toy",source="local_compute"} 7000.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="toy",source="local_cache_hit"} 900.0
vllm:request_prefill_time_seconds_sum{engine="0",model_name="toy"} 1.5
vllm:inter_token_latency_seconds_count{engine="0",model_name="toy"} 100.0
vllm:inter_token_latency_seconds_sum{engine="0",model_name="toy"} 2.0
vllm:nixl_bytes_transferred_sum{engine="0",model_name="toy"} 1.048576e+06
vllm:nixl_xfer_time_seconds_sum{engine="0",model_name="toy"} 0.01
vllm:external_prefix_cache_hits_total{engine="0",model_name="toy"} 64.0
python_gc_objects_collected_total{generation="0"} 12.0
"""


def test_facts_of_an_engine_with_two_data_parallel_ranks():
    facts = EngineFacts.parse(TEXT)
    assert (facts.running, facts.waiting, facts.kv_usage) == (7.0, 2.0, 0.5)
    assert (facts.kv_tokens, facts.block_size) == (32_000.0, 16)
    assert (facts.computed_tokens, facts.prefill_seconds) == (7000.0, 1.5)
    assert (facts.transferred_bytes, facts.transferred_tokens) == (1_048_576.0, 64.0)


def test_an_engine_that_does_not_say_its_size():
    facts = EngineFacts.parse('vllm:num_requests_running{engine="0"} 1.0\n')
    assert facts.kv_tokens is None
    assert facts.block_size is None


def test_the_fake_engine_is_understood():
    from hpcserve.engines.fake_server.metrics import Metrics, text

    assert EngineFacts.parse(text([Metrics("toy", 4096, transfers=True)]).decode()).running == 0.0


def test_what_came_from_the_nodes_memory_was_not_transferred():
    source = 'vllm:prompt_tokens_cached_by_source_total{engine="0",model_name="toy",source="%s"} %s\n'
    told = {"device": 900.0, "host": 20.0, "disk": 4.0, "p2p": 40.0, "external_unspecified": 0.0}
    facts = EngineFacts.parse(TEXT + "".join(source % each for each in told.items()))
    assert facts.transferred_tokens == 40.0


def test_of_several_ranks_one_can_be_read():
    from hpcserve.engines.fake_server.metrics import Metrics, text

    ranks = [
        Metrics("toy", 4096, transfers=True, blocks=10 * (rank + 1), block_size=16, rank=rank)
        for rank in range(11)
    ]
    ranks[1].transferred(seconds=1.0, posted=0.1, size=4096, descriptors=1)
    ranks[10].transferred(seconds=2.0, posted=0.1, size=512, descriptors=1)
    page = text(ranks).decode()
    assert page.count("# TYPE vllm:nixl_bytes_transferred histogram") == 1
    read = [EngineFacts.parse(page, rank) for rank in (0, 1, 10)]
    assert [(facts.kv_tokens, facts.transferred_bytes) for facts in read] == [
        (160.0, 0.0), (320.0, 4096.0), (1760.0, 512.0),
    ]  # fmt: skip
    assert EngineFacts.parse(page).transferred_bytes == 4608.0
    with pytest.raises(ValueError, match="not one metric"):
        EngineFacts.parse(page, 11)


def test_sglangs_metrics_are_understood():
    facts = EngineFacts.parse(
        'sglang:num_running_reqs{tp_rank="0",dp_rank="0"} 3.0\n'
        'sglang:num_running_reqs{tp_rank="0",dp_rank="1"} 1.0\n'
        'sglang:num_queue_reqs{tp_rank="0"} 2.0\n'
        'sglang:num_decode_transfer_queue_reqs{tp_rank="0"} 5.0\n'
        'sglang:token_usage{dp_rank="0"} 0.25\n'
        'sglang:token_usage{dp_rank="1"} 0.5\n'
        'sglang:max_total_num_tokens{dp_rank="0"} 1000.0\n'
        'sglang:max_total_num_tokens{dp_rank="1"} 1000.0\n'
        'sglang:prompt_tokens_total{is_streaming="true"} 90.0\n'
        'sglang:cached_tokens_total{cache_source="device"} 30.0\n'
        'sglang:inter_token_latency_seconds_sum{a="b"} 4.0\n'
        'sglang:inter_token_latency_seconds_count{a="b"} 100.0\n'
    )
    assert (facts.running, facts.waiting, facts.kv_usage, facts.kv_tokens) == (4.0, 7.0, 0.5, 2000.0)
    assert (facts.computed_tokens, facts.token_gaps, facts.token_gap_seconds) == (60.0, 100.0, 4.0)


def test_a_page_without_engine_metrics_is_an_error():
    with pytest.raises(ValueError, match="not one"):
        EngineFacts.parse("<html>404</html>")


def test_rates_follow_the_engine_and_a_restart_teaches_nothing():
    rates = Rates()
    before, after = EngineFacts(), EngineFacts.parse(TEXT)
    rates.learn(after, before)
    assert rates.prefill == PREFILL_TOKENS_PER_S
    assert not rates.measured
    rates.learn(before, after)
    assert rates.prefill == pytest.approx(7000 / 1.5)
    assert rates.decode == pytest.approx(50.0)
    assert rates.kv_bytes_per_token == pytest.approx(16_384.0)
    assert rates.transfer == pytest.approx(104_857_600.0)


def test_a_long_measurement_counts_for_more_and_old_ones_are_forgotten():
    rates = Rates()
    rates.observe("prefill", 10_000.0, 1.0)
    rates.observe("prefill", 10.0, 0.1)
    assert rates.prefill > 9_000.0
    for _ in range(400):
        rates.observe("prefill", 2_000.0, 1.0)
    assert rates.prefill == pytest.approx(2_000.0, rel=0.01)
