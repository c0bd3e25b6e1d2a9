"""A client may ask that its request is sent to fewer workers than the run would try."""

from __future__ import annotations

import pytest

from tests.router.stubs import Stub, drop

WHOLE = {"model": "toy", "prompt": "a b c d", "max_tokens": 4}


@pytest.mark.parametrize("roles", [("aggregated-0", "aggregated-1"), ("prefill-0", "decode-0", "decode-1")])
async def test_no_retries_means_one_answering_worker(start, roles):
    bench = await start(*roles, retries=2)
    answering: list[Stub] = [stub for name, stub in bench.stubs.items() if not name.startswith("prefill")]
    for stub in answering:
        stub.behave = drop
    status, error = await bench.error("/v1/completions", WHOLE, x_hpcserve_retries="0")
    assert (status, error["code"]) == (502, "worker_reset")
    assert sum(len(stub.seen) for stub in answering) == 1
    await bench.error("/v1/completions", WHOLE)
    assert sum(len(stub.seen) for stub in answering) == 3


async def test_no_retries_means_no_second_engine_for_a_prompt_that_broke_one(start):
    bench = await start("prefill-0", "prefill-1", "decode-0", retries=2)
    bench["prefill-0"].behave = bench["prefill-1"].behave = drop
    status, error = await bench.error("/v1/completions", WHOLE, x_hpcserve_retries="0")
    assert (status, error["code"]) == (502, "worker_reset")
    assert sum(len(bench[name].seen) for name in bench.stubs) == 1
    assert (await bench.ask("/v1/completions", WHOLE))[0] == 200


async def test_a_client_can_not_ask_for_more_than_the_run_tries(start):
    bench = await start("aggregated-0", "aggregated-1", retries=0)
    bench["aggregated-0"].behave = bench["aggregated-1"].behave = drop
    await bench.error("/v1/completions", WHOLE, x_hpcserve_retries="7")
    assert sum(len(bench[name].seen) for name in bench.stubs) == 1


async def test_a_header_that_is_no_number_is_refused_and_engines_never_see_it(start):
    bench = await start("aggregated-0")
    status, error = await bench.error("/v1/completions", WHOLE, x_hpcserve_retries="many")
    assert status == 400
    assert "x-hpcserve-retries must be a whole number" in error["message"]
    assert (await bench.ask("/v1/completions", WHOLE, x_hpcserve_retries="1"))[0] == 200
    assert bench["aggregated-0"].seen[-1].header(b"x-hpcserve-retries") is None
