"""The table of bad inputs: what is said, with which exit status, and that nothing is left behind."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from .conftest import MODEL, World

SITE = """\
name: mine
node: {gpus: 4, gpu_memory_gib: 80}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad:
    """One row: what is wrong, and what must come of it."""

    what: str
    status: int
    says: str
    """Part of the message."""
    hint: str = ""
    """Part of the hint."""
    args: tuple[str, ...] = ("launch", "--no-wait", "--nodes", "4", "model.yaml")
    model: str | None = MODEL
    env: Mapping[str, str] = field(default_factory=dict)
    given: Callable[[World], Any] | None = None
    """Prepares the world."""


def launch(*flags: str) -> tuple[str, ...]:
    return ("launch", "--no-wait", *flags, "model.yaml")


def refused(text: str) -> Callable[[World], None]:
    return lambda world: world.slurm.refuses(text)


def site(text: str) -> Callable[[World], None]:
    return lambda world: world.site("mine", text)


def fails(module: Any, name: str, number: int) -> Callable[[World], None]:
    """The operating system refuses this call from now on."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return lambda world: world.monkeypatch.setattr(module, name, refuse)


def no_slurm(world: World) -> None:
    world.monkeypatch.setenv("PATH", str(world.home))


FLAGS = [
    Bad(what="no such command", args=("lunch",), status=2, says="no command 'lunch'", hint="hpcserve launch"),
    Bad(what="an option before the command", args=("--nodes", "4"), status=2, says="before the command"),
    Bad(what="a misspelled flag", args=launch("--node", "4"), status=2, says="'--node'", hint="`--nodes`"),
    Bad(what="an abbreviated flag", args=launch("--wall", "60"), status=2, says="'--wall'"),
    Bad(what="no model", args=("launch", "--nodes", "4"), status=2, says="model.yaml"),
    Bad(what="two models", args=(*launch(), "other.yaml"), status=2, says="no argument 'other.yaml'"),
    Bad(what="nodes that are no number", args=launch("--nodes", "four"), status=2, says="--nodes: 'four'"),
    Bad(what="zero nodes", args=launch("--nodes", "0"), status=2, says="not a whole number from 1"),
    Bad(what="negative prefill", args=launch("--prefill", "-1"), status=2, says="--prefill"),
    Bad(what="a walltime in words", args=launch("--walltime", "1 day"), status=3, says="--walltime: '1 day'"),
    Bad(what="an impossible clock", args=launch("--walltime", "01:99:00"), status=3, says="'01:99:00'"),
    Bad(what="--set without a value", args=launch("--set", "decode"), status=3, says="--set decode"),
    Bad(
        what="--set of an unknown key",
        args=launch("--set", "decode.replica=2"),
        status=3,
        says="decode.replica",
        hint="decode.replicas",
    ),
    Bad(what="--set out of range", args=launch("--set", "max_model_len=3"), status=3, says="max_model_len"),
    Bad(what="a name with a slash", args=launch("--nodes", "4", "--name", "a/b"), status=4, says="--name"),
    Bad(
        what="prefill and decode that are not the nodes",
        args=launch("--nodes", "4", "--prefill", "3", "--decode", "2"),
        status=4,
        says="--prefill",
    ),
    Bad(what="more nodes than the site gives", args=launch("--nodes", "5"), status=4, says="at most 4"),
    Bad(what="an unknown role of logs", args=("logs", "x", "--role", "cook"), status=2, says="'cook'"),
    Bad(what="a wait that is no number", args=("stop", "x", "--wait", "soon"), status=2, says="'soon'"),
]

FILES = [
    Bad(what="a model.yaml that is missing", model=None, status=3, says="model.yaml"),
    Bad(what="an empty model.yaml", model="", status=3, says="model.yaml"),
    Bad(what="YAML that is broken", model="model: [org/tiny\n", status=3, says="model.yaml:"),
    Bad(
        what="an unknown key", model=MODEL + "walltimes: 60\n", status=3, says="model.yaml:4", hint="walltime"
    ),
    Bad(what="a key given twice", model=MODEL + "engine: vllm\n", status=3, says="engine"),
    Bad(what="an engine nobody has", model="model: a/b\nengine: vlm\n", status=3, says="engine", hint="vllm"),
    Bad(what="a number in quotes", model=MODEL + 'nodes: "4"\n', status=3, says="nodes"),
    Bad(what="a walltime under a minute", model=MODEL + "walltime: 5\n", status=3, says="walltime"),
    Bad(what="a model path that is missing", model="model: /nowhere/m\n", status=3, says="/nowhere/m"),
    Bad(
        what="both ways to serve",
        model=MODEL + "aggregated: {}\ndecode: {}\n",
        status=4,
        says="aggregated",
    ),
    Bad(
        what="a group that is not there",
        model=MODEL + "group: no-such-group-here\n",
        status=3,
        says="no-such-group-here",
        hint="you are in",
    ),
]

SITES = [
    Bad(what="no site fits", env={"HPCSERVE_SITE": ""}, status=3, says="no site config matches"),
    Bad(
        what="a misspelled --site",
        args=launch("--site", "test-clutser"),
        status=3,
        says="test-clutser",
        hint="test-cluster",
    ),
    Bad(what="a wrong HPCSERVE_SITE", env={"HPCSERVE_SITE": "mars"}, status=3, says="HPCSERVE_SITE"),
    Bad(what="a wrong HPCSERVE_SITES", env={"HPCSERVE_SITES": "/nowhere"}, status=3, says="HPCSERVE_SITES"),
    Bad(what="a relative HPCSERVE_RUNS", env={"HPCSERVE_RUNS": "runs"}, status=3, says="HPCSERVE_RUNS"),
    Bad(
        what="HPCSERVE_RUNS with an unset variable",
        env={"HPCSERVE_RUNS": "/x/$NOT_SET_ANYWHERE"},
        status=3,
        says="HPCSERVE_RUNS",
    ),
    Bad(
        what="a site with an unknown key",
        given=site(SITE + "slurm: {partitions: gpu}\n"),
        args=launch("--site", "mine", "--nodes", "2"),
        status=3,
        says="partitions",
        hint="partition",
    ),
    Bad(
        what="a site without nodes",
        given=site("name: mine\n"),
        args=launch("--site", "mine", "--nodes", "2"),
        status=3,
        says="node",
    ),
    Bad(
        what="an account that is required",
        given=site(SITE + "slurm: {account_required: true}\n"),
        args=launch("--site", "mine", "--nodes", "2"),
        status=4,
        says="account",
        hint="--account",
    ),
    Bad(
        what="a walltime beyond the site's",
        given=site(SITE + "slurm: {max_walltime: 01:00:00}\n"),
        args=launch("--site", "mine", "--nodes", "2", "--walltime", "02:00:00"),
        status=4,
        says="--walltime",
    ),
    Bad(
        what="a container without an image",
        given=site(SITE + "container: {runtime: pyxis}\n"),
        args=launch("--site", "mine", "--nodes", "2"),
        status=3,
        says="image",
    ),
    Bad(
        what="an image that was not pulled yet",
        given=site(SITE + "container: {runtime: apptainer, image: 'docker://a/b:1'}\n"),
        args=launch("--site", "mine", "--nodes", "2"),
        status=7,
        says="was not pulled yet",
        hint="hpcserve image pull --site mine",
    ),
    Bad(
        what="a cache of images that is no path",
        given=site(SITE + "container: {runtime: apptainer, image: 'docker://a/b:1', cache: $NOWHERE/i}\n"),
        args=launch("--site", "mine", "--nodes", "2"),
        status=3,
        says="container.cache",
        hint="all nodes share",
    ),
    Bad(
        what="an image to pull on a site without one",
        given=site(SITE),
        args=("image", "pull", "--site", "mine"),
        status=2,
        says="no image of a registry",
        hint="container.runtime",
    ),
    Bad(
        what="engines alone in a container on a site without one",
        given=site(SITE + "container: {agent: outside}\n"),
        args=launch("--site", "mine", "--nodes", "2"),
        status=4,
        says="container.agent: outside",
    ),
    Bad(
        what="GPUs on a site that has none",
        model="model: a/b\ndevice: cuda\n",
        args=launch("--site", "local", "--nodes", "2"),
        status=4,
        says="cuda",
    ),
]

SLURM = [
    Bad(what="no Slurm here", given=no_slurm, status=5, says="`sbatch` is not on", hint="--site local"),
    Bad(
        what="an account Slurm doesn't know",
        given=refused(
            "Batch job submission failed: Invalid account or account/partition combination specified"
        ),
        status=5,
        says="Invalid account",
        hint="--account",
    ),
    Bad(
        what="a partition Slurm doesn't know",
        given=refused("invalid partition specified: gpu"),
        status=5,
        says="invalid partition",
        hint="sinfo",
    ),
    Bad(
        what="a QOS limit",
        given=refused("Batch job submission failed: Job violates accounting/QOS policy"),
        status=5,
        says="QOS policy",
        hint="limit",
    ),
    Bad(
        what="a walltime Slurm won't give",
        given=refused("Batch job submission failed: Requested time limit is invalid"),
        status=5,
        says="time limit",
        hint="--walltime",
    ),
    Bad(
        what="more nodes than there are",
        given=refused("Batch job submission failed: Node count specification invalid"),
        status=5,
        says="Node count",
        hint="--nodes",
    ),
    Bad(
        what="GPUs asked for in the wrong way",
        given=refused("Batch job submission failed: Invalid generic resource (gres) specification"),
        status=5,
        says="gres",
        hint="gpu_request",
    ),
    Bad(
        what="a controller that is down",
        given=lambda world: world.slurm.is_down(),
        status=5,
        says="Unable to contact slurm controller",
        hint="scontrol ping",
    ),
    Bad(
        what="an sbatch that prints no job id",
        given=lambda world: world.slurm.says("sbatch", "Submitted\n"),
        status=5,
        says="printed no job id",
        hint="squeue --me",
    ),
]

STORAGE = [
    Bad(
        what="a full disk",
        given=fails(os, "fsync", errno.ENOSPC),
        status=7,
        says="No space left",
        hint="free space",
    ),
    Bad(what="a used-up quota", given=fails(os, "fsync", errno.EDQUOT), status=7, says="quota", hint="quota"),
    Bad(
        what="a runs directory you can't write",
        given=fails(tempfile, "mkdtemp", errno.EACCES),
        status=7,
        says="Permission denied",
        hint="HPCSERVE_RUNS",
    ),
    Bad(
        what="a read-only file system",
        given=fails(tempfile, "mkdtemp", errno.EROFS),
        status=7,
        says="Read-only",
        hint="HPCSERVE_RUNS",
    ),
    Bad(
        what="a runs directory below a file",
        env={"HPCSERVE_RUNS": "/dev/null/runs"},
        status=7,
        says="/dev/null",
    ),
]

STORAGE += [
    Bad(
        what="files into a directory that can't be made",
        args=("launch", "--nodes", "4", "--output-script", "/dev/null/x", "model.yaml"),
        status=7,
        says="/dev/null/x",
        hint="another directory",
    ),
    Bad(
        what="files below a file",
        args=("launch", "--nodes", "4", "--output-script", "model.yaml", "model.yaml"),
        status=7,
        says="Not a directory",
        hint="another directory",
    ),
    Bad(
        what="a runs directory whose name is too long",
        env={"HPCSERVE_RUNS": "/" + "x" * 300},
        status=7,
        says="File name too long",
        hint="HPCSERVE_RUNS",
    ),
]

RUNS = [
    Bad(what="status of no run", args=("status", "ghost"), status=8, says="no run is called 'ghost'"),
    Bad(what="logs of no run", args=("logs", "ghost"), status=8, says="ghost", hint="hpcserve ls"),
    Bad(what="stop of no run", args=("stop", "ghost"), status=8, says="ghost"),
    Bad(what="connect to no run", args=("connect", "ghost"), status=8, says="ghost"),
    Bad(what="chat with no run", args=("chat", "ghost", "hello"), status=8, says="ghost"),
]

TABLE = [*FLAGS, *FILES, *SITES, *SLURM, *STORAGE, *RUNS]


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.what)
def test_a_bad_input_is_one_error_and_leaves_nothing(world: World, bad: Bad) -> None:
    if bad.model is None:
        world.model.unlink()
    else:
        world.model.write_text(bad.model)
    for name, value in bad.env.items():
        world.monkeypatch.setenv(name, value)
    if bad.given is not None:
        bad.given(world)
    answer = world(*bad.args)
    message, _, hint = answer.err.partition("\n\nhint: ")
    last = message.rpartition("error: ")[2]
    assert (answer.status, bad.says in last) == (bad.status, True), answer.err
    assert bad.hint in hint, answer.err
    assert hint.strip(), f"no hint: {answer.err}"
    assert "Traceback" not in answer.err
    assert answer.out == ""
    assert world.files() == set()
    submitted = [call for call in world.slurm.calls("sbatch") if "--parsable" in call]
    assert not submitted or bad in SLURM


def test_the_table_has_no_row_twice() -> None:
    assert len({bad.what for bad in TABLE}) == len(TABLE) >= 40


def test_a_disk_that_fills_up_at_any_file_leaves_nothing(world: World) -> None:
    """Every write of a launch fails once; the one after sbatch takes the job back."""
    real, calls, writes = os.fsync, 0, 0

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    world.monkeypatch.setattr(os, "fsync", fsync)
    statuses = []
    while not statuses or statuses[-1] != 0:
        calls, writes = 0, writes + 1
        statuses.append(world(*launch("--nodes", "4")).status)
        assert statuses[-1] in (0, 7)
        if statuses[-1] == 7:
            assert world.files() == set()
    assert len(statuses) > 10
    # Two writes come after sbatch: run.json and its directory.
    assert world.slurm.calls("scancel") == ["scancel 42", "scancel 42"]
