"""CPU time of a dry run against that of `python -c 'import yaml'`: python -m tests.cli.bench_startup"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROUNDS = 15


def cpu_seconds(command: list[str], environ: dict[str, str]) -> float:
    """The least of several rounds, user and system time: other processes can only add to it."""
    best = float("inf")
    for _ in range(ROUNDS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return best


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        model = Path(home) / "model.yaml"
        model.write_text("model: org/tiny\n")
        environ = {**os.environ, "HOME": home, "HPCSERVE_SITE": "dgx-h100"}
        hpcserve = [sys.executable, "-m", "hpcserve"]
        yaml = cpu_seconds([sys.executable, "-c", "import yaml"], environ)
        for words in (["--help"], ["launch", "--dry-run", "--nodes", "8", str(model)]):
            cost = cpu_seconds([*hpcserve, *words], environ)
            print(f"{words[0]:<8} {cost * 1e3:6.1f} ms CPU, {cost / yaml:4.1f}x of `import yaml`")
        print(f"{'yaml':<8} {yaml * 1e3:6.1f} ms CPU")


if __name__ == "__main__":
    main()
