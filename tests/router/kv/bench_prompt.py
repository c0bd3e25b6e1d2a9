"""What a prompt of 12,000 words costs besides placement: `python -m tests.router.kv.bench_prompt`."""

from __future__ import annotations

import json
import random
import timeit
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from hpcserve.engines.kv_events.digest import Digest
from hpcserve.engines.kv_events.format import BlockStored
from hpcserve.router.demand import Demand
from hpcserve.router.kv.residency import Residency
from hpcserve.router.kv.translation import Translation
from hpcserve.router.prompt import Prompts

WORDS = 12_000


def main() -> None:
    random.seed(1)
    text = " ".join(random.choices(["alpha", "beta", "gamma", "delta", "of", "the"], k=WORDS))
    messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": text}]
    long = call({"model": "m", "messages": messages, "max_tokens": 64, "stream": True})
    short = call({"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64})
    prompts = Prompts(["m"])
    demand = prompts.demand(long)
    print(f"{len(long.body):,} bytes, {len(demand.chain)} chunks, {WORDS:,} ids")
    show("demand, 12,000 words", lambda: prompts.demand(long))
    show("demand, one word", lambda: prompts.demand(short))
    residency = Residency()
    residency.predict("decode-0", demand, now=0.0)
    show("predict again", lambda: residency.predict("decode-0", demand, now=0.0))
    show("matches, predicted", lambda: residency.matches(demand.chain, now=0.0))
    tokens = [random.randrange(128_000) for _ in range(WORDS)]
    ids = json.dumps(tokens, separators=(",", ":")).encode()[1:-1]
    chain = demand.chain
    show("learn all of it", lambda: Translation(most=1_000_000).learn(demand, ids, len(chain)))
    show("learn nothing: it comes once", lambda: Translation(most=1_000_000).learn(demand, ids, 0))
    known = Translation(most=1_000_000)
    known.learn(demand, ids, len(chain))
    show("learn nothing: it is known", lambda: known.learn(demand, ids, len(chain)))

    known = Translation(most=1_000_000)
    known.learn(demand, ids, len(chain) - 2)

    def next_turn() -> None:
        turn = (random.getrandbits(64), random.getrandbits(64))
        more = Demand(
            prompt_tokens=demand.prompt_tokens, output_tokens=1, chain=chain[:-2] + turn,
            chunk_tokens=demand.chunk_tokens, space=demand.space,
        )  # fmt: skip
        known.learn(more, ids, len(chain))

    show("learn two more chunks", next_turn)
    event = BlockStored(hashes=list(range(WORDS // 16)), parent=None, tokens=tokens, block_size=16, tier=0)

    def digested() -> None:
        digest = Digest()
        digest.apply([event])
        digest.changes()

    show("an agent's digest of its blocks", digested)


def call(body: Any) -> Any:
    exchange = SimpleNamespace(path="/v1/chat/completions", header=lambda name: None)
    return SimpleNamespace(body=json.dumps(body).encode(), exchange=exchange, fields=None)


def show(what: str, work: Callable[[], object]) -> None:
    times = timeit.repeat(work, number=10, repeat=100)
    print(f"{min(times) * 1e5:8.1f} us  {what}")


if __name__ == "__main__":
    main()
