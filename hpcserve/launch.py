"""A launch: read, plan, render, make the run directory, submit. The first three touch nothing."""

from __future__ import annotations

import json
import os
import pwd
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from . import __version__
from .config.document import read_text
from .config.load import Loaded, load_model, to_json
from .config.model import ROLES, ModelSpec, Role, RoleSpec
from .config.model_facts import is_local, read_facts
from .config.site import Site
from .config.sites import find_site, site_files
from .errors import ConfigError, HpcserveError, StorageError
from .plan.offload import shared_bytes
from .plan.plan import BatchPlan, Plan
from .plan.planner import make_plan
from .plan.request import PlanRequest
from .rundir.atomic import storage_error, write_text
from .rundir.runs import (
    RUNS_VARIABLE,
    NameTaken,
    Run,
    RunRecord,
    create_run,
    free_run_id,
    remove_run,
    runs_root,
    write_record,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRequest:
    """The command line of a launch, parsed."""

    model: Path
    nodes: int | None = None
    prefill: int | None = None
    decode: int | None = None
    walltime: int | None = None
    """Seconds."""
    name: str | None = None
    account: str | None = None
    partition: str | None = None
    site: str | None = None
    overrides: tuple[str, ...] = ()
    batch: BatchPlan | None = None
    pools: Mapping[Role, RoleSpec] | None = None
    """Instead of those of model.yaml."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Everything about a launch that is known before anything is touched."""

    model_text: str
    model: Loaded[ModelSpec]
    site: Loaded[Site]
    plan: Plan
    root: Path
    run_id: str

    @property
    def run_path(self) -> Path:
        return self.root / self.run_id


def prepare(request: LaunchRequest, environ: Mapping[str, str], hostname: str) -> Prepared:
    """Read the files and plan. Raises ConfigError and PlanError."""
    model = _absolute(load_model(request.model, request.overrides))
    if request.pools is not None:
        pools = {role: request.pools.get(role) for role in ROLES}
        model = replace(model, value=replace(model.value, **pools))  # type: ignore[arg-type]
    site = find_site(request.site, environ=environ, hostname=hostname, model=model)
    if model.value.kv_offload is not None and model.value.kv_offload.shared_gib is not None:
        site = _with_kv_directory(site)
    facts = read_facts(model.value.model, revision=model.value.revision, environ=environ)
    plan = make_plan(
        PlanRequest(
            model=model.value,
            site=site.value,
            facts=facts,
            nodes=request.nodes,
            prefill=request.prefill,
            decode=request.decode,
            walltime=request.walltime,
            name=request.name,
            account=request.account,
            partition=request.partition,
            batch=request.batch,
            origins={**model.origins, **{f"site.{name}": where for name, where in site.origins.items()}},
        )
    )
    root = runs_root(site.value.storage.runs, environ)
    return Prepared(
        model_text=read_text(request.model, what="model.yaml"),
        model=model,
        site=site,
        plan=plan,
        root=root,
        run_id=free_run_id(root, plan.name),
    )


def _absolute(model: Loaded[ModelSpec]) -> Loaded[ModelSpec]:
    """A path means the same on every node, whose working directory is another one."""
    spec = model.value
    if not is_local(spec.model):
        return model
    path = os.path.abspath(os.path.expanduser(spec.model))
    return replace(model, value=replace(spec, model=path))


def _with_kv_directory(site: Loaded[Site]) -> Loaded[Site]:
    """`storage.kv` means the same on every node, whose variables may be others. Raises ConfigError."""
    given = site.value.storage.kv
    if given is None:
        return site
    text = os.path.expandvars(os.path.expanduser(given))
    if "$" in text or not text.startswith("/"):
        raise ConfigError(
            f"`storage.kv` of site {site.value.name}: {text!r} is not an absolute path once ~ and $VARIABLES "
            "are filled in",
            hint="name a directory of yours on a file system that all nodes share",
        )
    storage = replace(site.value.storage, kv=os.path.normpath(text))
    return replace(site, value=replace(site.value, storage=storage))


def files(prepared: Prepared) -> dict[str, str]:
    """What a launch writes: relative path -> text, the same for a dry run and for the real one.

    Raises ConfigError when an engine's flags contradict hpcserve's own.
    """
    from .render.engine import render_commands
    from .render.script import render_script

    return {
        "job.sh": render_script(prepared.plan, prepared.run_path, python=sys.executable),
        "engines.sh": render_commands(prepared.plan, python=sys.executable),
        "plan.json": json.dumps(to_json(prepared.plan), indent=1, sort_keys=True) + "\n",
    }


_ELSEWHERE = "name another directory, one that you can write"


def write_files(directory: Path, texts: Mapping[str, str]) -> list[Path]:
    """Write `files` below `directory`, each of them whole. Raises StorageError, and leaves nothing then."""
    written: list[Path] = []
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        for name, text in texts.items():
            path = directory / name
            if not path.parent.exists():
                made = [path.parent, *made] if path.parent not in made else made
                path.parent.mkdir(parents=True)
            write_text(path, text, mode=0o700 if name.endswith(".sh") else 0o600)
            written.append(path)
    except (OSError, HpcserveError) as error:
        for path in written:
            path.unlink()
        for path in made:
            with suppress(OSError):  # not made yet, or somebody else's file came in
                path.rmdir()
        if isinstance(error, OSError):
            raise storage_error(error, "write", hint=_ELSEWHERE) from error
        if isinstance(error, StorageError):
            raise StorageError(error.message, hint=_ELSEWHERE) from error
        raise
    return written


def submit(prepared: Prepared, command: Sequence[str], *, after: str | None = None) -> Run:
    """Make the run directory and hand the job over; `after` is a job that must be over before it begins.

    The run's id may differ from that of `prepared`, when another launch took it meanwhile. Raises
    StorageError, SlurmError, and KeyboardInterrupt for a Ctrl-C; neither a run directory nor a job
    is left then.
    """
    from .images.pull import need_image

    need_image(prepared.plan.site, os.environ)
    _need_kv_directory(prepared.plan)
    while True:
        try:
            return _submit(prepared, command, after)
        except NameTaken:
            # Its own path is in the job script, so everything is rendered again.
            prepared = replace(prepared, run_id=free_run_id(prepared.root, prepared.plan.name))


def _need_kv_directory(plan: Plan) -> None:
    """The directory of `kv_offload.shared_gib`, with room for it. Raises StorageError."""
    from .engines.kv_files import make_directory, need_room

    size = shared_bytes(plan)
    if size and plan.site.storage.kv is not None:
        make_directory(plan.site.storage.kv)
        need_room(plan.site.storage.kv, size)


def _submit(prepared: Prepared, command: Sequence[str], after: str | None) -> Run:
    from . import slurm

    plan = prepared.plan
    record = RunRecord(
        name=plan.name,
        run_id=prepared.run_id,
        site=plan.site.name,
        scheduler=plan.site.scheduler,
        job_id=None,
        user=_user(),
        host=os.uname().nodename,
        created=round(time.time(), 3),
        version=__version__,
        command=tuple(command),
    )
    run = create_run(
        prepared.root,
        record,
        {**files(prepared), "model.yaml": prepared.model_text},
        group=plan.model.group,
        api_key=plan.model.router.auth,
    )
    scheduler = slurm.get(plan.site.scheduler)
    with _interrupt_later() as interrupted:
        try:
            job_id = scheduler.submit(run.script, run.path, after=after)
        except BaseException:
            remove_run(run)
            raise
        record = replace(record, job_id=job_id)
        try:
            write_record(run, record)
            if interrupted():
                raise KeyboardInterrupt
        except BaseException:
            scheduler.cancel(job_id, force=True)
            remove_run(run)
            raise
    return Run(run, record)


@contextmanager
def _interrupt_later() -> Iterator[Callable[[], bool]]:
    """Keep Ctrl-C from falling between "Slurm has the job" and "we know its id"; says whether it came."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # Python gives signals to the main thread only
        return
    before = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)


def _user() -> str:
    """The name of who launches, or the number of a user whom this host has no name for."""
    number = os.geteuid()
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def known_roots(environ: Mapping[str, str]) -> tuple[list[Path], list[HpcserveError]]:
    """Where runs may be: HPCSERVE_RUNS, or the runs directories of all known sites that exist here.

    A site config that can't be read is no reason to lose sight of other runs: its error is returned.
    """
    if environ.get(RUNS_VARIABLE):
        return [runs_root("", environ)], []
    roots: dict[Path, None] = {}
    errors: list[HpcserveError] = []
    chosen = environ.get("HPCSERVE_SITE", "")
    for name in (*site_files(environ), *([chosen] if chosen.endswith(".yaml") else [])):
        try:
            site = find_site(name, environ=environ, hostname="").value
        except HpcserveError as error:
            errors.append(error)
            continue
        # A variable that is only set on another cluster: its runs can't be here.
        with suppress(HpcserveError):
            root = runs_root(site.storage.runs, environ)
            if os.path.isdir(root):
                roots[root.resolve()] = None
    return list(roots), errors
