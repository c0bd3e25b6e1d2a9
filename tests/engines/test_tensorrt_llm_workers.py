"""How TensorRT-LLM starts its workers, with the real Open MPI, inside a Slurm job's environment.

TensorRT-LLM itself is stood in for by the few lines of it that start workers (llmapi/mpi_session.py,
MpiPoolSession), behind the real start module and the environment that an agent makes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from hpcserve.node.agent.environment import engine_environment
from tests.fake_engine.running import wait_until
from tests.patience import DEADLINE
from tests.plan.cases import model, site, tp

from .cases import command

SERVE = """
import os, sys, time
from mpi4py.futures import MPIPoolExecutor

class OpenAIServer:
    pass

def worker(_):
    return os.getpid(), not [name for name in os.environ if name.startswith("SLURM_")]

def main(*, args, prog_name):
    with MPIPoolExecutor(max_workers=2, path=sys.path) as pool:
        for pid, clean in pool.map(worker, range(2)):
            print("worker", pid, clean, flush=True)
        if "--wait" in args:
            time.sleep(600)
"""
# As the job's environment has them on a node, where nothing but the agent's step was started by srun.
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOBID": "77",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NODELIST": "n[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "PMIX_RANK": "1",
    "OMPI_COMM_WORLD_RANK": "1",
}


@pytest.fixture
def environ(tmp_path: Path) -> Iterator[dict[str, str]]:
    """What the agent's process has, as it leaves it to an engine."""
    commands = tmp_path / "tensorrt_llm" / "commands"
    commands.mkdir(parents=True)
    for folder in (commands.parent, commands):
        (folder / "__init__.py").touch()
    (commands / "serve.py").write_text(SERVE)
    made = command(model(engine="tensorrt-llm", aggregated=tp(2)), site(), replica="aggregated-0")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    python = os.pathsep.join([str(tmp_path), *sys.path])
    agents = {**SLURM, "PATH": path, "PYTHONPATH": python, "HOME": str(tmp_path)}
    # Sockets are below it, so its path must be short.
    with tempfile.TemporaryDirectory(prefix="trt") as scratch:
        yield engine_environment(agents, made.env, key_variable="TRTLLM_API_KEY", key="k", scratch=scratch)


@contextmanager
def started(environ: dict[str, str], *flags: str) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-m", "hpcserve.engines.tensorrt_llm_server", "--served-model-name", "m", *flags]
    with subprocess.Popen(
        argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_a_worker_for_each_gpu_is_started_without_a_launcher(environ: dict[str, str]) -> None:
    with started(environ, "/m") as process:
        output, _ = process.communicate(timeout=DEADLINE)
    told = [line.split() for line in output.splitlines() if line.startswith("worker ")]
    assert process.returncode == 0 and [clean for _, _, clean in told] == ["True", "True"], output


def test_workers_end_with_the_process_that_an_agent_kills(environ: dict[str, str]) -> None:
    """MPI puts each of them into a process group of its own."""
    with started(environ, "/m", "--wait") as process:
        assert process.stdout is not None
        told: list[str] = []
        while len(pids := [int(line.split()[1]) for line in told if line.startswith("worker ")]) < 2:
            line = process.stdout.readline()
            assert line, "".join(told)
            told.append(line)
        assert all(os.getpgid(pid) != process.pid for pid in pids)
        os.killpg(process.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(running, pids)), "the workers to end")


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
