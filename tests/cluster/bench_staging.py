"""Staging against sbcast on the test cluster: `python -m tests.cluster.bench_staging [GIB] [ROUNDS]`.

The four nodes are namespaces of one machine, which reads, hashes, sends, receives and writes for all of
them, with a tmpfs as every node's disk: only the direction of a difference means anything. As root.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from . import testbed
from .launched import Launches
from .test_staging import SPEC

SHARDS = 4
SBCAST = """\
cd {model} && began=$(date +%s.%N)
srun --ntasks-per-node=1 mkdir -p /tmp/sb
for file in *; do sbcast --force --preserve "$file" "/tmp/sb/$file" || exit 1; done
echo "$(date +%s.%N) - $began" | bc
srun --ntasks-per-node=1 rm -r /tmp/sb
"""


def make(model: Path, size: int) -> None:
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text("{}")
    for number in range(SHARDS):
        with (model / f"model-{number}.safetensors").open("wb") as file:
            for _ in range(size // SHARDS >> 20):
                file.write(os.urandom(1 << 20))


def main(argv: list[str]) -> int:
    size = int(float(argv[0] if argv else 1) * (1 << 30))
    rounds = int(argv[1]) if len(argv) > 1 else 3
    with testbed.machine_lock():
        cluster = testbed.up()
        try:
            launches = Launches(cluster, "hsuser")
            model = cluster.home("hsuser") / "bench-model"
            make(model, size)
            for _ in range(rounds):
                script = launches.file("sbcast.sh", SBCAST.format(model=model))
                done = cluster.as_user("hsuser", ["salloc", "-N4", "bash", str(script)], timeout=600)
                print(f"sbcast   {float(done.stdout.split()[-1]):6.2f} s", flush=True)
                run = launches.launch(SPEC.format(model=model), name="bench")
                run.wait_ready()
                (told,) = run.events("staged")
                print(f"staging  {told['seconds']:6.2f} s  {json.dumps(told)}", flush=True)
                run.cancel()
                for host in cluster.hosts:
                    cluster.as_user("hsuser", ["sh", "-c", "rm -r /tmp/hpcserve-*"], node=host.name)
        finally:
            shutil.rmtree(cluster.home("hsuser") / "bench-model", ignore_errors=True)
            testbed.down()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
