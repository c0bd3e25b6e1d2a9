"""How near a batch comes to what its engines can do, on fake engines of known capacity.

    python -m tests.batch.bench {steady|long-row|prefix|prefix-vllm}

Each is a whole `hpcserve batch --site local`, with the launcher, eight engines, the router and the driver;
`prefix-vllm` has one engine, real vLLM on the CPU. Figures are ratios: to the engines' capacity, to the ideal
end, or of two orders of work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hpcserve.batch.begin import BatchRequest, Model, begin
from tests.models import smollm2

WORKERS = 8


@dataclass(frozen=True, slots=True)
class Ran:
    """One batch. Times are seconds."""

    samples: list[tuple[float, int, int, float]]
    """Time, results, output tokens, requests waiting in engines."""
    part: dict[str, Any]
    """What the driver noted at its end."""

    @property
    def steady(self) -> float:
        """Output tokens a second between a fifth and four fifths of the results."""
        total = self.samples[-1][1]
        inside = [one for one in self.samples if 0.2 * total <= one[1] <= 0.8 * total]
        return (inside[-1][2] - inside[0][2]) / (inside[-1][0] - inside[0][0])

    @property
    def seconds(self) -> float:
        """From the driver's begin to its last result."""
        return float(self.part["last_result"] - self.part["began"])


def fake(engine_args: str) -> str:
    """model.yaml of eight engines with these flags."""
    return (
        f"model: org/tiny\nserved_name: toy\nengine: fake\naggregated: {{replicas: {WORKERS}}}\n"
        f"engine_args: {{{engine_args}}}\n"
    )


def run(
    folder: Path,
    model_text: str,
    lines: Iterable[dict[str, Any]],
    *,
    nodes: int = WORKERS,
    input_order: bool = False,
) -> Ran:
    """A batch of OpenAI lines."""
    folder.mkdir()
    model, data, out = folder / "model.yaml", folder / "data.jsonl", folder / "out"
    model.write_text(model_text)
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if input_order:
        planned = begin(
            BatchRequest(inputs=[str(data)], output=out),
            Model(served_name="toy", path=yaml.safe_load(model_text)["model"], revision=None),
        )
        # The command goes on with this plan, in another order.
        np.arange(planned.manifest.items, dtype="<u8").tofile(planned.directory.plan / "order.bin")
    samples: list[tuple[float, int, int, float]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.25):
            try:
                status = json.loads((out / ".batch" / "status.json").read_text())
            except (FileNotFoundError, ValueError):
                continue
            job, waiting = status["this_job"], sum(load["waiting"] for load in status["engines"].values())
            if not samples or status["time"] != samples[-1][0]:
                samples.append((status["time"], job["results"], job["output_tokens"], waiting))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        subprocess.run(
            [sys.executable, "-m", "hpcserve", "batch", "--site", "local", "--nodes", str(nodes),
             str(model), str(data), "-o", str(out)],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "HPCSERVE_RUNS": str(folder / "runs")},
        )  # fmt: skip
    finally:
        over.set()
        watcher.join()
    [part] = [json.loads(path.read_text()) for path in (out / ".batch" / "history").glob("*.json")]
    return Ran(samples, part)


def request(number: int, prompt: str, tokens: int) -> dict[str, Any]:
    body = {"model": "toy", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    return {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}


def steady(folder: Path) -> None:
    seqs, itl = 8, 0.05
    capacity = WORKERS * seqs / itl
    lines = (request(n, f"row {n}", 8 + n % 17) for n in range(6000))
    ran = run(folder / "steady", fake(f"max-num-seqs: {seqs}, itl-ms: {1000 * itl:g}"), lines)
    cpu = 1e6 * ran.part["cpu_seconds"] / ran.part["results"]
    print(f"the driver: {cpu:.0f} us of CPU time a row, {ran.part['memory_bytes'] >> 20} MiB")
    waiting = [one[3] for one in ran.samples if 0.2 < one[1] / 6000 < 0.8]
    print(f"steady state: {ran.steady:.0f} of {capacity:.0f} output tokens/s: {ran.steady / capacity:.1%};")
    print(f"engines had requests waiting in {sum(w > 0 for w in waiting) / len(waiting):.0%} of samples")


def long_row(folder: Path) -> None:
    seqs, itl, rows, tokens = 12, 0.02, 100_000, 16
    lines = [request(n, f"row {n}", tokens) for n in range(rows)]
    lines[rows * 2 // 3] = request(rows, "the long one", 100 * tokens)
    random.Random(1).shuffle(lines)
    ran = run(folder / "long", fake(f"max-num-seqs: {seqs}, itl-ms: {1000 * itl:g}"), lines)
    ideal = max(100 * tokens * itl, (rows + 99) * tokens * itl / (WORKERS * seqs))
    print(f"one row of {rows:,} a hundred times as long: {ran.seconds:.1f} s, ideal {ideal:.1f} s")
    print(f"{ran.seconds / ideal - 1:+.1%} over ideal, start and end included")


def prefix(folder: Path) -> None:
    prompts = _long_prompts(50, 2500)
    lines = [request(n, f"{prompts[n % 50]} question {n}", 4) for n in range(10_000)]
    random.Random(2).shuffle(lines)
    # A cache of about six prompts in each engine, and prefill that is the bottleneck.
    _two_orders(
        folder,
        fake("max-num-seqs: 16, itl-ms: 5, prefill-tokens-per-second: 60000, kv-blocks: 1200"),
        lines,
        nodes=WORKERS,
    )


def prefix_vllm(folder: Path) -> None:
    prompts, rows = 10, 100
    words = _long_prompts(prompts, 700)
    lines = [request(n, f"{words[n % prompts]} question {n}", 4) for n in range(rows)]
    random.Random(2).shuffle(lines)
    # A word is a token: five blocks of 128 per prompt, and a cache for four prompts, two of them in use.
    model = (
        f"model: {smollm2(folder / 'SmolLM2-135M-Instruct')}\nserved_name: toy\nengine: vllm\ndevice: cpu\n"
        "dtype: float32\nmax_model_len: 2048\naggregated: {replicas: 1}\n"
        "engine_args: {enforce-eager: true, max-num-seqs: 2, block-size: 128, num-gpu-blocks-override: 24}\n"
    )
    _two_orders(folder, model, lines, nodes=1)


def _long_prompts(count: int, words: int) -> list[str]:
    return [" ".join(random.Random(n).choices("abcdefghijkl", k=words)) for n in range(count)]


def _two_orders(folder: Path, model: str, lines: list[dict[str, Any]], *, nodes: int) -> None:
    took = {}
    for order in ("prefix", "input"):
        ran = run(folder / order, model, lines, nodes=nodes, input_order=order == "input")
        took[order] = ran.seconds
        print(f"{order} order: {took[order]:.1f} s", flush=True)
    print(f"prefix order is {took['input'] / took['prefix']:.2f} times as fast")


def main() -> None:
    kinds = {"steady": steady, "long-row": long_row, "prefix": prefix, "prefix-vllm": prefix_vllm}
    parser = argparse.ArgumentParser(description="Measure a batch against its engines' capacity.")
    parser.add_argument("what", choices=kinds)
    with tempfile.TemporaryDirectory() as folder:
        kinds[parser.parse_args().what](Path(folder))


if __name__ == "__main__":
    main()
