"""What a request's body and its stream cost the router, step by step: `python -m tests.router.bench_body`.

A chat of 100 and one of 12,000 words, each prompt another one, and the events vLLM 0.32 answers with where
it names tokens. Figures are medians of many rounds, and the tenth part that went quickest, in microseconds.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

from hpcserve.router import call as calls
from hpcserve.router.demand import Demand
from hpcserve.router.kv.residency import Residency
from hpcserve.router.prompt import Prompts
from hpcserve.router.stream.asked import Asked, ask, splice
from hpcserve.router.stream.events import EventStream
from hpcserve.router.stream.generated import GeneratedStream

ROUNDS = 300
PIECE = 16 * 1024
"""Bytes in which a long event arrives."""
WORKERS = 8
HEADERS = [
    (b"host", b"127.0.0.1:8000"), (b"accept", b"*/*"), (b"accept-encoding", b"gzip, deflate"),
    (b"user-agent", b"AsyncOpenAI/Python 1.99.0"), (b"authorization", b"Bearer 0123456789abcdef"),
    (b"content-type", b"application/json"), (b"content-length", b"600"),
]  # fmt: skip
HEAD = b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk",'
HEAD += b'"created":1700000000,"model":"mock",'


class Exchange:
    """As much of `http.exchange.Exchange` as is asked here."""

    path = "/v1/chat/completions"

    def header(self, name: bytes) -> bytes | None:
        for key, value in HEADERS:
            if key == name:
                return value
        return None


class Asking:
    def __init__(self, body: bytes) -> None:
        self.body = body
        self.exchange = Exchange()
        self.fields: Any = None


def main() -> None:
    random.seed(1)
    for words in (100, 12_000):
        requests(words)
    for tokens in (100, 12_000):
        opening(tokens)
    events()


def requests(words: int) -> None:
    prompts = Prompts(["m"])
    roomy, full = Residency(), Residency()
    steps = Steps()
    size = tokens = 0
    bodies = [body(words) for _ in range(2 * ROUNDS)]
    for number, read in enumerate(bodies):
        # As the connection does with the pieces it has read.
        one = Asking(b"".join((read[:100], read[100:])))
        size = len(one.body)
        worker = f"w-{number % WORKERS}"
        if number == ROUNDS:
            # The second half meets caches that are full.
            for name in range(WORKERS):
                full.capacity(f"w-{name}", tokens * ROUNDS / 2 / WORKERS)
                roomy.capacity(f"w-{name}", 1e9)
        fields = steps.take("fields", calls.fields, one.exchange, one.body)
        steps.take("value of model and stream", _model_and_stream, fields)
        steps.take("refuse_transfers", calls.refuse_transfers, fields)
        one.fields = fields
        demand: Demand = steps.take("demand", prompts.demand, one)
        tokens = demand.prompt_tokens
        steps.take("matches, nothing held", roomy.matches, demand.chain, now=0.0)
        steps.take("predict, new", roomy.predict, worker, demand, now=0.0)
        steps.take("matches, predicted", roomy.matches, demand.chain, now=0.0)
        steps.take("predict, again", roomy.predict, worker, demand, now=0.0)
        steps.take("predict, new, full caches", full.predict, worker, demand, now=0.0)
        steps.take("ask, splice", _asked, one)
    print(f"\na chat of {words:,} words, {size:,} bytes")
    steps.show()


def _model_and_stream(fields: Any) -> None:
    calls.value(fields, "model")
    calls.value(fields, "stream")


def _asked(one: Asking) -> None:
    given = dict(one.fields)
    splice(one.body, given, ask(given).added)


def opening(tokens: int) -> None:
    ids = b",".join(b"%d" % random.randrange(100_000, 128_000) for _ in range(tokens))
    role = (
        HEAD + b'"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
        b'"finish_reason":null}],"prompt_token_ids":[' + ids + b"]}\n\n"
    )
    pieces = [role[at : at + PIECE] for at in range(0, len(role), PIECE)]
    # The mock engine of the benchmark puts the ids before the choices.
    early = role.replace(b',"prompt_token_ids":[' + ids + b"]", b"").replace(
        b'"choices"', b'"prompt_token_ids":[' + ids + b'],"choices"', 1
    )
    print(f"\nthe opening of a stream, {tokens:,} tokens, {len(role):,} bytes in {len(pieces)} pieces")
    cost("opening", [stream() for _ in range(ROUNDS)], lambda one: feed(one, pieces))
    cost("opening at once", [stream() for _ in range(ROUNDS)], lambda one: one.feed(role))
    cost("opening, ids first", [stream() for _ in range(ROUNDS)], lambda one: one.feed(early))
    passing = [EventStream(_nowhere) for _ in range(ROUNDS)]
    cost("the same, passed on", passing, lambda one: feed(one, pieces))


def events() -> None:
    role = (
        HEAD + b'"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
        b'"finish_reason":null}],"prompt_token_ids":[1,2,3]}\n\n'
    )
    usage = b'"usage":{"prompt_tokens":100,"total_tokens":116,"completion_tokens":16}}\n\n'
    token, last = chat(b"null", b""), chat(b'"length"', b'"stop_reason":null,')
    named = last.replace(b'"stop_reason":null,', b"")
    print(f"\nevents of a stream, a token's {len(token)} bytes")

    def opened(event: bytes, *, wants: bool = False) -> Callable[[GeneratedStream], None]:
        def work(one: GeneratedStream) -> None:
            one.feed(event)

        fed = [stream(wants=wants) for _ in range(ROUNDS)]
        for one in fed:
            one.feed(role)
        streams[:] = fed
        return work

    streams: list[GeneratedStream] = []
    cost("a token", streams, opened(token), times=100)
    cost("a token, wanted with its id", streams, opened(token, wants=True), times=100)
    cost("text without ids", streams, opened(token.replace(b"[1917]", b"null")), times=100)
    cost("finish", streams, opened(last))
    cost("finish, no stop_reason", streams, opened(named))
    cost("usage", streams, opened(HEAD + b'"choices":[],' + usage))
    cost("usage, passed on", streams, opened(HEAD + b'"choices":[],' + usage, wants=True))
    done = b"data: [DONE]\n\n"
    cost("[DONE]", streams, opened(done))
    closing = last + HEAD + b'"choices":[],' + usage + done
    cost("finish, usage, [DONE] in one piece", streams, opened(closing))


def chat(finish: bytes, stop: bytes) -> bytes:
    return (
        HEAD + b'"choices":[{"index":0,"delta":{"content":" hello"},"logprobs":null,"finish_reason":'
        + finish + b"," + stop + b'"token_ids":[1917]}]}\n\n'
    )  # fmt: skip


def stream(*, wants: bool = False) -> GeneratedStream:
    asked = Asked(wants_ids=wants, wants_usage=wants)
    return GeneratedStream(_nowhere, asked, chat=True, on_prompt_ids=lambda ids: True)


def _nowhere(data: bytes) -> None:
    pass


def feed(one: Any, pieces: Iterable[bytes]) -> None:
    for piece in pieces:
        one.feed(piece)


def body(words: int) -> bytes:
    text = " ".join(random.choices(["alpha", "beta", "gamma", "delta", "omega", "theory"], k=words))
    messages = [{"role": "user", "content": text}]
    request = {"model": "m", "messages": messages, "max_tokens": 16, "stream": True, "temperature": 0.7}
    return json.dumps(request).encode()


class Steps:
    """How long each step took in each round, after the others and with what they left in the caches."""

    def __init__(self) -> None:
        self._taken: dict[str, list[float]] = {}

    def take(self, step: str, work: Callable[..., Any], *given: Any, times: int = 1, **named: Any) -> Any:
        began = time.perf_counter()
        for _ in range(times):
            found = work(*given, **named)
        self._taken.setdefault(step, []).append((time.perf_counter() - began) / times)
        return found

    def show(self) -> None:
        for step, taken in self._taken.items():
            taken = sorted(taken[len(taken) // 2 :])
            print(f"{taken[len(taken) // 2] * 1e6:8.2f} us, p10 {taken[len(taken) // 10] * 1e6:8.2f}  {step}")


def cost(step: str, subjects: Iterable[Any], work: Callable[[Any], object], *, times: int = 1) -> None:
    steps = Steps()
    for one in subjects:
        steps.take(step, work, one, times=times)
    steps.show()


if __name__ == "__main__":
    main()
