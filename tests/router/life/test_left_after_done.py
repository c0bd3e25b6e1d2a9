"""A client that closes at `data: [DONE]` has its whole answer: the openai client and guidellm do that.

vLLM sends the end of the chunked body by itself, after `[DONE]`; who stops reading there is gone by then.
"""

from __future__ import annotations

import pytest

from hpcserve.http.exchange import Exchange
from tests.router.stubs import Seen, until

from .test_fast_path import event, idle, way  # noqa: F401 - a fixture

CHAT = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": True}
USAGE = (
    b'data: {"id":"cmpl-1","object":"x","created":1,"model":"toy","choices":[],'
    b'"usage":{"prompt_tokens":5,"completion_tokens":3,"total_tokens":8}}\n\n'
)


async def done_and_waits(exchange: Exchange, seen: Seen) -> bool:
    """A behaviour: the whole answer, and no end of the body."""
    if not (seen.body or {}).get("stream"):
        return False
    exchange.start(200, [(b"content-type", b"text/event-stream")])
    for number, text in enumerate("abc"):
        exchange.write(event(text, str(number), '"length"' if number == 2 else "null", chat=True))
        await exchange.drain()
    exchange.write(USAGE)
    exchange.write(b"data: [DONE]\n\n")
    await exchange.closed
    return True


@pytest.mark.parametrize("headers", [{}, {"x_hpcserve_explain": "1"}], ids=["flight", "task"])
@pytest.mark.parametrize("roles", [("aggregated-0",), ("prefill-0", "decode-0")], ids=["one", "pair"])
async def test_who_leaves_after_done_is_served_and_counted(start, way, roles, headers):  # noqa: F811
    bench = await start(*roles)
    bench[roles[-1]].behave = done_and_waits
    response = await bench.open("/v1/chat/completions", CHAT, **headers)
    data = b""
    while not data.endswith(b"[DONE]\n\n"):
        data += await response.next_chunk()
    response.abort()
    await until(lambda: idle(bench), "the end of all bookkeeping")
    assert bench.metric('hpcserve_router_requests_total{route="/v1/chat/completions",status="200"}') == 1
    assert bench.metric('hpcserve_router_cancelled_total{route="/v1/chat/completions"}') == 0
    assert bench.metric("hpcserve_router_prompt_tokens_total") == 5
    assert bench.metric("hpcserve_router_generation_tokens_total") == 3
    [item] = bench.router.admission.meter.take()
    assert item[3:] == (1, 5, 0, 3)
