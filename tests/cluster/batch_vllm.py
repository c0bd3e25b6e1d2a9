"""A dataset through real vLLM on two nodes of the test cluster: `python -m tests.cluster.batch_vllm`.

200 questions from Parquet to Parquet, one prefill and one decode engine that pass their KV cache by NIXL,
greedy and in float32; then the texts are compared with those of one engine without disaggregation, started by
hand. Needs root, and takes minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import requests

from tests.models import smollm2

from . import paths, testbed
from .launched import Launches
from .test_vllm_disaggregated import MODEL, QUESTIONS, alone, by_hand
from .testbed import Testbed, wait_for

_TOKENS = 32
_SECONDS = 1200


def questions(rows: int) -> list[str]:
    """All of them different."""
    found = [*QUESTIONS]
    found += [f"What is {a} times {b}?" for a in range(2, 12) for b in range(2, 12)]
    found += [f"Tell me one fact about the number {number}." for number in range(rows)]
    return found[:rows]


def expected(cluster: Testbed, model: Path, asked: list[str]) -> list[str]:
    """One engine's texts."""
    with by_hand(cluster, "n1", alone(cluster, model)) as url, ThreadPoolExecutor(4) as threads:

        def ask(question: str) -> str:
            body = {
                "model": "smollm2", "messages": [{"role": "user", "content": question}],
                "max_tokens": _TOKENS, "temperature": 0,
            }  # fmt: skip
            answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=_SECONDS)
            answer.raise_for_status()
            return str(answer.json()["choices"][0]["message"]["content"])

        return list(threads.map(ask, asked))


def batch(launches: Launches, model: Path, asked: list[str]) -> pa.Table:
    """What `hpcserve batch` made of them."""
    out = launches.cluster.home(launches.user) / "vllm.out"
    shutil.rmtree(out, ignore_errors=True)
    spec = launches.file("vllm.yaml", MODEL.format(model=model))
    template = launches.file("vllm.j2", "{{ question }}")
    data = launches.file("vllm.parquet", "")
    pq.write_table(pa.table({"id": range(len(asked)), "question": asked}), data)
    launches.hpcserve(
        "batch", "--site=test-cluster", "--nodes=2", "--no-wait", str(spec), str(data), "-o", str(out),
        "--template", str(template), "--sampling", f"max_tokens={_TOKENS}", "--sampling", "temperature=0",
    )  # fmt: skip

    def logs() -> str:
        ends = [path.read_text()[-2000:] for path in out.parent.glob(".hpcserve/runs/*/logs/*.log")]
        return "\n".join([launches.cluster.slurm("squeue"), *ends])

    wait_for((out / "report.txt").exists, what="the batch", seconds=_SECONDS, state=logs, pause=1.0)
    print((out / "report.txt").read_text(), end="")
    report = json.loads((out / "report.json").read_text())
    assert report["errors"] == 0, report
    return pq.read_table(out / "output.parquet")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200)
    options = parser.parse_args()
    asked = questions(options.rows)
    model = smollm2(paths.MODELS / "SmolLM2-135M-Instruct")
    with testbed.machine_lock():
        cluster = testbed.up()
        try:
            began = time.monotonic()
            texts = expected(cluster, model, asked)
            print(f"one engine by hand: {time.monotonic() - began:.0f} s, its start included")
            table = batch(Launches(cluster, "hsuser"), model, asked)
        finally:
            testbed.down()
    in_order = table["id"].to_pylist() == [*range(len(asked))] and table["question"].to_pylist() == asked
    differences = [
        (question, one, other)
        for question, one, other in zip(asked, texts, table["response"].to_pylist(), strict=True)
        if one != other
    ]
    print(
        f"{len(asked)} rows, in order: {in_order}; {len(asked) - len(differences)} texts equal one engine's"
    )
    for question, one, other in differences:
        print(f"differs: {question!r}\n  one engine: {one!r}\n  the batch:  {other!r}")
    return 0 if in_order and not differences else 1


if __name__ == "__main__":
    sys.exit(main())
