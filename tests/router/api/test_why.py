"""Why a request went where it went: in its response, over HTTP, and on the command line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

from hpcserve.cli import main as cli
from hpcserve.cli.why_route import render
from hpcserve.router.keys.identity import Identity
from hpcserve.router.placement.decision import Candidate, Decision
from hpcserve.router.why.explain import explain
from hpcserve.router.why.ring import Ring

from ..stubs import DEADLINE, KEY, answer_with
from .conftest import Endpoint
from .engine import ApiEngine

ASK = {"model": "toy", "prompt": "a b c d"}
STATE = "/v1/hpcserve/decisions"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("engines", [("aggregated-0", "aggregated-1"), ("prefill-0", "decode-0", "decode-1")])
async def test_response_says_why_to_who_asks_and_to_nobody_else(start, engines, stream):
    bench = await start(*engines, policy="kv")
    _, headers, _ = await bench.ask("/v1/completions", {**ASK, "stream": stream}, x_hpcserve_explain="1")
    told = json.loads(headers["x-hpcserve-decision"])
    assert told["worker"] == engines[1] or told["worker"] in engines
    assert told["policy"] == "kv" and told["decision_us"] > 0
    assert told["candidates"] and told["candidates"][0]["terms"]
    for candidate in told["candidates"]:
        assert candidate["cost"] == pytest.approx(sum(candidate["terms"].values()), abs=1e-4)
    _, headers, _ = await bench.ask("/v1/completions", {**ASK, "stream": stream})
    assert "x-hpcserve-decision" not in headers
    assert not any(seen.header(b"x-hpcserve-explain") for stub in bench.stubs.values() for seen in stub.seen)


async def test_retry_is_told_and_both_choices_are_kept(start):
    bench = await start("aggregated-0", "aggregated-1")
    bench["aggregated-0"].behave = answer_with(503)
    for number in range(2):
        _, headers, _ = await bench.ask(
            "/v1/completions", ASK, x_hpcserve_explain="1", x_request_id=f"r-{number}"
        )
        told = json.loads(headers["x-hpcserve-decision"])
        assert told["worker"] == "aggregated-1"
        if told["retries"]:
            break
    assert told["retries"] == 1
    (kept,) = (await bench.json(f"{STATE}?request_id=r-{number}", method="GET"))["data"]
    assert [decision["worker"] for decision in kept["decisions"]] == ["aggregated-0", "aggregated-1"]
    assert (kept["status"], kept["retries"], kept["path"]) == (200, 1, "/v1/completions")


async def test_newest_decisions_come_first_and_as_many_as_asked(start):
    bench = await start("aggregated-0")
    for number in range(5):
        await bench.ask("/v1/completions", ASK, x_request_id=f"r-{number}")
    found = (await bench.json(f"{STATE}?limit=3", method="GET"))["data"]
    assert [entry["request_id"] for entry in found] == ["r-4", "r-3", "r-2"]
    for limit in ("0", "201", "x", "-1"):
        assert (await bench.error(f"{STATE}?limit={limit}", method="GET"))[0] == 400
    assert (await bench.error(STATE, method="GET", key=None))[0] == 401


async def test_user_key_sees_its_own_decisions_only(start):
    bench = await start("aggregated-0")
    users = {b"Bearer ada": Identity(key="k1", name="ada"), b"Bearer bob": Identity(key="k2", name="bob")}
    bench.router.keyring.identify = lambda exchange: users[exchange.header(b"authorization")]
    await bench.ask("/v1/completions", ASK, key="ada", x_request_id="hers")
    await bench.ask("/v1/completions", ASK, key="bob", x_request_id="his")
    found = (await bench.json(STATE, method="GET", key="ada"))["data"]
    assert [entry["request_id"] for entry in found] == ["hers"]
    assert (await bench.json(f"{STATE}?request_id=his", method="GET", key="ada"))["data"] == []
    _, _, text = await bench.ask("/metrics", method="GET", key="ada")
    assert b"bob" not in text and b"hpcserve_router_key_tokens_total" not in text


async def test_decisions_of_all_processes_are_found_and_printed(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await endpoint.start(ApiEngine("prefill-0", "prefill"), ApiEngine("decode-0", "decode"), processes=2)
    import httpx

    for number in range(6):
        # Each has a connection of its own, so both processes get some.
        async with httpx.AsyncClient(headers={"authorization": f"Bearer {KEY}"}) as client:
            answer = await client.post(
                f"{endpoint.url}/v1/completions", json=ASK, headers={"x-request-id": f"r-{number}"}
            )
            assert answer.status_code == 200
    key = tmp_path / "api.key"
    args = ["why-route", "--url", endpoint.url, "--key-file", str(key)]
    async with asyncio.timeout(DEADLINE):
        assert await asyncio.to_thread(cli.main, [*args, "--last", "6", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [entry["request_id"] for entry in told["requests"]] == [f"r-{n}" for n in (5, 4, 3, 2, 1, 0)]
    assert await asyncio.to_thread(cli.main, [*args, "--request-id", "r-3"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("r-3 ") and "decode-0" in text
    assert await asyncio.to_thread(cli.main, [*args, "--request-id", "nobody"]) == 8
    assert "remembers no decision" in capsys.readouterr().err
    key.write_text("wrong")
    assert await asyncio.to_thread(cli.main, args) == 8
    assert "--key-file" in capsys.readouterr().err


def test_why_route_needs_a_run_or_a_router(capsys):
    assert cli.main(["why-route"]) == 2
    assert cli.main(["why-route", "a-run", "--url", "http://127.0.0.1:1"]) == 2
    assert cli.main(["why-route", "--url", "http://127.0.0.1:1"]) == 8


class _Named:
    def __init__(self, name: str) -> None:
        self.name = name


class _Shown:
    def __init__(self, candidates: Iterable[Candidate]) -> None:
        self._candidates = tuple(candidates)

    def candidates(self) -> tuple[Candidate, ...]:
        return self._candidates


def decision(prefill: str | None, *candidates: tuple[str, dict[str, float]]) -> Decision:
    return Decision(
        answering=_Named("decode-1"), prefill=prefill and _Named(prefill), policy="kv", cached_tokens=512,
        uncached_tokens=100, seconds=0.00004,
        shown=_Shown(
            Candidate(worker=name, cost=sum(terms.values()), terms=terms, cached_tokens=512)
            for name, terms in candidates
        ),
    )  # fmt: skip


def test_table_shows_terms_the_winner_and_why_the_prompt_is_computed_where():
    made = decision(
        None,
        ("decode-1", {"queue": 0.002, "prefill": 0.01}),
        ("prefill-0+decode-1", {"queue": 0.002, "prefill": 0.01, "transfer": 0.008}),
    )
    request = {
        "request_id": "r-1", "time": 0.0, "path": "/v1/completions", "user": "ada", "status": 200,
        "retries": 0, "migrations": 0, "decisions": [explain(made)],
    }  # fmt: skip
    lines = render(request).splitlines()
    assert lines[2] == "decode-1 does it all"
    assert lines[3] == "policy kv, 512 tokens of the prompt cached and 100 to compute, decided in 40 µs"
    assert lines[4].split() == ["worker", "cost", "ms", "queue", "prefill", "transfer", "cached", "tokens"]
    assert lines[5].split() == ["*", "decode-1", "12.0", "2.0", "10.0", "-", "512"]
    assert lines[6].split() == ["prefill-0+decode-1", "20.0", "2.0", "10.0", "8.0", "512"]
    assert lines[7].endswith("(prefill-0+decode-1) it would cost 8.0 ms more")


def test_infinite_costs_are_still_json():
    told = explain(decision("prefill-0", ("prefill-0+decode-1", {"kv": float("inf")})))
    assert msgspec.json.decode(msgspec.json.encode(told)) == told
    assert told["candidates"][0]["cost"] == -1


def test_ring_keeps_the_newest():
    class Call:
        request_id, user, model, retries, migrations = "", "", "toy", 0, 0
        route = type("Route", (), {"path": "/v1/completions"})
        exchange = type("Exchange", (), {"status": 200})
        decisions = (decision(None),)

    ring = Ring(kept=3)
    for number in range(5):
        call = Call()
        call.request_id = str(number)
        ring.add(call)
    assert [entry["request_id"] for entry in ring.find(limit=10)] == ["4", "3", "2"]
