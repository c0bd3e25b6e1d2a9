"""`make demo`: a disaggregated endpoint on this machine, one question, and what it took.

Everything goes through the commands a user types; this script only types them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import requests
from openai import OpenAI
from prepare_model import smollm2

HERE = Path(__file__).resolve().parent
HPCSERVE = Path(sys.executable).parent / "hpcserve"
NAME = "demo"
QUESTION = "What is the capital of France? Answer in one sentence."


def hpcserve(*arguments: str, capture: bool = False) -> str:
    """Run a command the way a user does, showing it first."""
    print(f"\n$ hpcserve {' '.join(arguments)}", flush=True)
    done = subprocess.run(
        [str(HPCSERVE), *arguments], check=True, text=True, stdout=subprocess.PIPE if capture else None
    )
    return done.stdout or ""


def read(*arguments: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(hpcserve(*arguments, "--json", capture=True))
    return answer


def ask(url: str, key_file: Path) -> str:
    client = OpenAI(base_url=url, api_key=key_file.read_text().strip())
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=40,
        temperature=0,
    )
    return answer.choices[0].message.content or ""


def nixl_bytes(engine_url: str, job_key: str) -> float:
    """KV bytes the decode engine has pulled by NIXL, from its own metrics."""
    response = requests.get(
        f"{engine_url}/metrics", headers={"Authorization": f"Bearer {job_key}"}, timeout=10
    )
    response.raise_for_status()
    values = re.findall(r"^vllm:nixl_bytes_transferred_sum\{[^}]*\} (\S+)$", response.text, re.MULTILINE)
    return sum(map(float, values))


def left_running(run_dir: str) -> list[str]:
    """Our processes that still belong to the run: its directory is in their command or environment."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            if process.stat().st_uid != os.getuid():
                continue
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue  # it ended while we looked
        if run_dir.encode() in text:
            found.append(process.name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="where the model is, or is put")
    model = parser.parse_args().model.resolve()
    os.environ["HPCSERVE_RUNS"] = str(model.parent / "runs")
    smollm2(model)

    started = time.monotonic()
    hpcserve(
        *("launch", "--site", "local", "--nodes", "2", "--name", NAME),
        *("--set", f"model={model}", str(HERE / "model.yaml")),
    )
    try:
        endpoint = read("connect", NAME)["endpoint"]
        status = read("status", NAME)
        run_dir = status["directory"]
        job_key = (Path(run_dir) / "secrets" / "job-key").read_text().strip()
        decode = next(w["url"] for w in status["controller"]["workers"] if w["role"] == "decode")
        before = nixl_bytes(decode, job_key)
        answer = ask(endpoint["url"], Path(endpoint["key_file"]))
        moved = nixl_bytes(decode, job_key) - before
        print(f"\nquestion: {QUESTION}\nanswer:   {answer}")
        print(f"KV bytes moved by NIXL for this answer, by the decode engine's count: {moved:,.0f}")
    finally:
        hpcserve("stop", NAME)
    left = left_running(run_dir)
    print(f"processes left running: {len(left)}; {time.monotonic() - started:.0f} s in all")
    ok = "Paris" in answer and moved > 0 and not left
    print("\nnext: write a model.yaml and try `.venv/bin/hpcserve launch --nodes 2 --dry-run model.yaml`")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
