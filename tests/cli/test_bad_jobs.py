"""The table of jobs that start and fail: what is said, with which exit status, and that nothing is left.

Every row is a launch by a user of its own. They mostly wait, so a few of them run at a time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.patience import DEADLINE

# Without mpirun, which would take half of each row's time; the rows about MPI put it back.
NO_MPI = "slurm: {mpi: none}\n"
ONE = "model: org/tiny\nengine: fake\naggregated: {}\n"
PAIR = "model: org/tiny\nengine: fake\nprefill: {nodes: 1}\ndecode: {nodes: 1}\n"
AT_ONCE = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    status: int
    out: str
    err: str


@dataclass(slots=True)
class User:
    """Somebody with a home, a site config and a model.yaml, on this user."""

    home: Path
    scratch: Path
    held: ExitStack = field(default_factory=ExitStack)

    @property
    def run(self) -> Path:
        return self.home / ".hpcserve/runs/bad"

    @property
    def model(self) -> Path:
        return self.home / "model.yaml"

    def __call__(self, *words: str) -> Answer:
        """`hpcserve WORDS`."""
        ours = ("HPCSERVE_", "SBATCH_", "SLURM_", "XDG_")
        environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        done = subprocess.run(
            [sys.executable, "-m", "hpcserve", *words],
            cwd=self.home,
            env={**environ, "HOME": str(self.home), "HPCSERVE_SITE": "mine"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        return Answer(status=done.returncode, out=done.stdout, err=done.stderr)

    def site(self, more: str = "", mpi: str = NO_MPI) -> None:
        directory = self.home / ".config/hpcserve/sites"
        directory.mkdir(parents=True)
        more = more if "storage:" in more else f"storage: {{node_local: {self.scratch}}}\n{more}"
        (directory / "mine.yaml").write_text(f"extends: local\n{mpi}{more}")

    def holds(self, port: int) -> bool:
        """Listen on a port as somebody else's program would; False when it is not free."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
            sock.listen()
        except OSError:
            sock.close()
            return False
        self.held.enter_context(closing(sock))
        return True

    def program(self, name: str, shell: str) -> Path:
        """An executable beside the job's Python."""
        path = self.home / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{shell}\n")
        path.chmod(0o755)
        return path

    def python(self, shell: str, mpi: str = NO_MPI) -> None:
        """The job's Python is a script: `shell`, then the real one with the words in "$@"."""
        path = self.program("python", f'{shell}\nexec {sys.executable} "$@"')
        self.site(f"setup: {{python: {path}}}\n", mpi)

    def processes(self) -> list[str]:
        """Live processes that name the run directory in their command line or environment."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes() + b"\0" + (entry / "environ").read_bytes()
                text = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if os.fsencode(self.run) in words and text[text.rindex(")") + 2] != "Z":
                found.append(f"{entry.name} {words[:200]!r}")
        return found

    def wait_until_nothing_runs(self, seconds: float = DEADLINE) -> None:
        deadline = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < deadline, left
            time.sleep(0.05)

    def leave(self) -> None:
        self.held.close()
        if self.run.exists():
            self.run.chmod(0o700)
            self("stop", "bad", "--wait", "0")
            self("stop", "bad", "--wait", "20")
        shutil.rmtree(self.scratch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad:
    what: str
    says: str
    """Part of the message."""
    hint: str
    """Part of the hint."""
    model: str = ONE
    status: int = 6
    given: Callable[[User], object] = User.site
    slow: bool = False


def engine(flags: str, model: str = ONE) -> str:
    return f"{model}engine_args: {{{flags}}}\n"


def all_ports_taken(user: User) -> None:
    """Sixteen neighbours, none of them free, below the ports that the kernel gives out itself."""
    for low in range(21000, 29000, 16):
        with ExitStack() as attempt:
            row = User(user.home, user.scratch, attempt)
            if all(row.holds(port) for port in range(low, low + 16)):
                user.held.enter_context(attempt.pop_all())
                user.site(f"ports: {{low: {low}, high: {low + 15}}}\n")
                return
    raise AssertionError("no sixteen free ports in a row on this machine")


def router_port_taken(user: User) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    assert user.holds(port)
    user.site()
    with user.model.open("a") as model:
        model.write(f"router: {{port: {port}}}\n")


def no_transport(user: User) -> None:
    user.python('if [ "$3" = rendezvous ]; then echo "no network at all" >&2; exit 75; fi')


def rank_1_never_comes(user: User) -> None:
    # The job waits two minutes; the row does not.
    user.python(
        'if [ "$3" = rendezvous ]; then\n'
        '  if [ "$HPCSERVE_RANK" = 1 ]; then exit 0; fi\n'
        '  set -- "$@" --timeout 3\n'
        "fi"
    )


def loses_the_directory(user: User) -> None:
    # Root may write everywhere, unless it gives that up.
    drop = "setpriv --inh-caps=-all --bounding-set=-all" if os.geteuid() == 0 else ""
    user.python(
        f'if [ "$3" = head ]; then\n  chmod 500 "$HPCSERVE_RUN_DIR"\n  exec {drop} {sys.executable} "$@"\nfi'
    )


def disk_fills_up(user: User) -> None:
    """No file may grow any more from the head's start on: the limit reaches what a full disk does."""
    user.python('if [ "$3" = head ]; then ulimit -f 0; fi')


def no_scratch(user: User) -> None:
    user.site("storage: {node_local: /proc}\n")


BAD = [
    Bad(
        what="an engine that takes no such flag",
        model=engine("no-such-flag: 1"),
        says="unrecognized arguments: --no-such-flag",
        hint="engine_args",
    ),
    Bad(
        what="an engine that runs out of memory",
        model=engine("fail: ['exit_at_start:cause=oom']"),
        says="out of memory",
        hint="tensor_parallel",
    ),
    Bad(
        what="an engine that finds no model",
        model=engine("fail: ['exit_at_start:cause=model-missing']"),
        says="Invalid repository ID or local directory specified: 'org/tiny'",
        hint="every node can read",
    ),
    Bad(
        what="an engine whose disk is full",
        model=engine("fail: ['exit_at_start:cause=disk-full']"),
        says="No space left on device",
        hint="storage.node_local",
    ),
    Bad(
        what="an engine whose port is taken each time",
        model=engine("fail: ['exit_at_start:cause=port-taken']") + "ready_timeout: 8\n",
        says="Address already in use",
        hint="REPLICA.NODE.log",
    ),
    Bad(
        what="an engine that never gets ready",
        model=engine("fail: [never_ready]") + "ready_timeout: 2\n",
        says="1 of 1 replicas were not ready after 2 s",
        hint="ready_timeout",
    ),
    Bad(
        what="a KV path that moves no bytes",
        model=engine("fail: ['drop_transfer:count=1000']", PAIR),
        says="counted no KV bytes",
        hint="network",
        slow=True,
    ),
    Bad(
        what="no transport for the rendezvous",
        model=PAIR,
        given=no_transport,
        says="the rendezvous ended with status 6 before all ranks had met",
        hint="logs/job.log",
    ),
    Bad(
        what="a rank that never joins",
        model=PAIR,
        given=rank_1_never_comes,
        says="1 of 2 ranks did not show up after 3 s: rank 1",
        hint="rendezvous-RANK.log",
    ),
    Bad(
        what="a port range with no free port",
        given=all_ports_taken,
        says="free port",
        hint="`ports.low` and `ports.high`",
    ),
    Bad(
        what="a router port that somebody else has",
        given=router_port_taken,
        says="the router can't start: port",
        hint="`router.port`",
    ),
    Bad(
        what="a run directory that can't be written any more",
        given=loses_the_directory,
        status=7,
        says="Permission denied",
        hint="HPCSERVE_RUNS",
    ),
    Bad(
        what="a disk that is full when the head begins",
        given=disk_fills_up,
        status=7,
        says="the head process ended with status 7",
        hint="logs/head.log",
    ),
    Bad(
        what="a node-local directory that can't be written",
        given=no_scratch,
        says="/proc",
        hint="node_local",
        slow=True,
    ),
]


WORLDS_OF_ONE = Bad(
    what="an MPI that gives worlds of size one",
    model=PAIR,
    status=0,
    says="COMM_WORLD has 1 rank",
    hint="--mpi",
    given=lambda user: (
        # A wrong plugin: every rank runs, alone.
        user.program(
            "mpirun",
            'while [ "$1" != "$HPCSERVE_PYTHON" ]; do if [ "$1" = -n ]; then ranks=$2; fi; shift; done\n'
            'for ((rank = 0; rank < ranks; rank++)); do HPCSERVE_RANK=$rank "$@" & pids+=("$!"); done\n'
            'for pid in "${pids[@]}"; do wait "$pid" || status=$?; done\n'
            'exit "${status:-0}"'.replace("$HPCSERVE_PYTHON", str(user.home / "bin/python")),
        ),
        user.python(":", mpi=""),
    ),
)
NO_MPIRUN = Bad(
    what="no mpirun beside Python",
    model=PAIR,
    status=0,
    says="there is no mpirun beside",
    hint="extra `local`",
    given=lambda user: user.python(":", mpi=""),
)
TABLE = [*BAD, WORLDS_OF_ONE, NO_MPIRUN]


@dataclass(frozen=True, slots=True)
class Launched:
    user: User
    answer: Answer


@pytest.fixture(scope="module")
def rows(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Launched]]]:
    """The launches of all rows that are to be tested, some at a time."""
    tests = [item for item in request.session.items if item.path == request.path]
    wanted = {str(item.callspec.params["what"]) for item in tests if hasattr(item, "callspec")}
    # The slow ones first.
    chosen = sorted((bad for bad in TABLE if bad.what in wanted), key=lambda bad: not bad.slow)
    # Short, as sockets lie below it.
    users = [User(tmp_path_factory.mktemp("home"), Path(tempfile.mkdtemp(prefix="hs-bad-"))) for _ in chosen]

    def launch(user: User, bad: Bad) -> Launched:
        user.model.write_text(bad.model)
        bad.given(user)
        return Launched(user, user("launch", "--name", "bad", "model.yaml"))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {bad.what: pool.submit(launch, user, bad) for user, bad in zip(users, chosen, strict=True)}
        pool.shutdown(cancel_futures=True)
    for user in users:
        user.leave()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("what", [bad.what for bad in BAD])
def test_a_job_that_fails_says_why_and_leaves_nothing(rows: dict[str, Future[Launched]], what: str) -> None:
    [bad] = [row for row in BAD if row.what == what]
    done = rows[what].result()
    user, answer = done.user, done.answer
    message, _, hint = answer.err.rpartition("error: ")[2].partition("\n\nhint: ")
    assert answer.status == bad.status, answer.err
    assert bad.says in message, answer.err
    assert bad.hint in hint, answer.err
    assert hint.strip()
    assert "Traceback" not in answer.err
    assert answer.out == ""
    assert answer.err.count("✗") <= 1, answer.err

    user.wait_until_nothing_runs()
    assert temporary_files(user.run) == []
    assert left_on_node(user.scratch) == []
    assert not (user.run / "endpoint.json").exists()
    [listed] = json.loads(user("ls", "--json").out)["runs"]
    status = json.loads(user("status", "bad", "--json").out)
    assert listed["state"] == status["state"] == "failed"
    assert bad.says in listed["detail"], listed
    assert bad.says in status["detail"], status
    assert "is over already" in user("stop", "bad").err


@pytest.mark.timeout(180)
@pytest.mark.parametrize("what", [WORLDS_OF_ONE.what, NO_MPIRUN.what])
def test_without_a_working_mpi_tcp_takes_over_visibly(rows: dict[str, Future[Launched]], what: str) -> None:
    [bad] = [row for row in TABLE if row.what == what]
    done = rows[what].result()
    user, answer = done.user, done.answer
    assert answer.status == 0, answer.err
    shown = answer.err + (user.run / "logs/job.log").read_text()
    warnings = re.findall(r"warning: (.*)\nhint: (.*)", shown)
    assert [hint for message, hint in warnings if bad.says in message and bad.hint in hint], shown
    assert "2/2 over tcp" in answer.err
    assert json.loads((user.run / "roster.json").read_text())["transport"] == "tcp"
    assert user("stop", "bad").status == 0
    user.wait_until_nothing_runs()
    assert left_on_node(user.scratch) == []


def left_on_node(scratch: Path) -> list[Path]:
    """All but the place where agents write down what they would leave."""
    own = scratch / f"hpcserve-{os.getuid()}"
    return [path for path in scratch.rglob("*") if path not in (own, own / "locks")]


def temporary_files(run: Path) -> list[str]:
    """Files that are not finished: write_text's begin with a dot."""
    return [str(path) for path in run.rglob("*") if path.name.startswith(".") or path.name.endswith(".tmp")]


def test_a_half_written_file_would_be_seen(tmp_path: Path) -> None:
    """The check above can fail."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / ".head.json.abc").touch()
    assert len(temporary_files(tmp_path)) == 1


def test_the_table_has_no_row_twice() -> None:
    assert len({bad.what for bad in TABLE}) == len(TABLE)
