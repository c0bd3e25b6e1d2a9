"""How soon engines hear of clients that leave: `python -m tests.router.life.bench_disconnects`.

A thousand clients leave a real router and fake engines at once. Prints, per layout and kind of answer, the
seconds from then until no engine counts a running request.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from tests.router.migration.field import Field

from .crowd import CLIENTS, ENGINES, FLAGS, files, leave


async def main() -> None:
    for layout, engines in ENGINES.items():
        for stream in (True, False):
            with tempfile.TemporaryDirectory(prefix="hpcserve-bench-") as folder:
                field = Field(Path(folder), *engines, flags=FLAGS)
                try:
                    await field.start()
                    seconds = await leave(field, stream=stream)
                finally:
                    await field.stop()
            kind = "mid-stream" if stream else "waiting for a whole answer"
            print(f"{layout}, {kind}: {CLIENTS} clients gone from the engines after {seconds:.2f} s")


if __name__ == "__main__":
    with files():
        asyncio.run(main())
