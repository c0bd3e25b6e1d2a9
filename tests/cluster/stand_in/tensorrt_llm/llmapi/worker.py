"""One rank of the step. Rank 0 tells the server who is there; all then wait in MPI, as real workers do."""

from __future__ import annotations

import json
import os
import socket
import threading

from mpi4py import MPI

PLACE = "TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR"


def main() -> None:
    world = MPI.COMM_WORLD
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    mine = {
        "rank": world.rank,
        "node": socket.gethostname(),
        "gpus": visible,
        "scratch": os.environ["TMPDIR"],
    }
    ranks = world.gather(mine)
    print("worker", json.dumps(mine), flush=True)
    if ranks is not None:
        _serve(json.dumps(ranks).encode())
    world.bcast("end" if world.rank == 0 else None)


def _serve(told: bytes) -> None:
    """Until it is killed."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.environ[PLACE] + ".new")
        listener.listen()
        os.rename(os.environ[PLACE] + ".new", os.environ[PLACE])
        server, _ = listener.accept()
        with server:
            server.sendall(told + b"\n")
            # As over ZeroMQ, it is not noticed when the server is gone.
            threading.Event().wait()


if __name__ == "__main__":
    main()
