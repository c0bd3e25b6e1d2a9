"""Plan -> job script. Pure: the same plan and paths give the same bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from ..config.resources import resources
from ..config.site import SlurmSite
from ..plan.explain import duration
from ..plan.plan import RENDEZVOUS_TIMEOUT, Component, Plan
from ..plan.preflight import PREFLIGHT_WAIT, has_preflight
from . import quoting
from .containers import (
    FOREIGN,
    LIBRARIES,
    NO_USER_SITE,
    apptainer_words,
    hides_devices,
    image_libraries,
    pyxis_words,
)
from .gpus import gpu_request
from .quoting import Expanding
from .summary import layout_line

DRAIN_MARGIN = 30
"""Seconds beside drain and KillWait between the walltime's signal and its end."""
_LARGEST_SIGNAL_TIME = 65535
"""sbatch's own limit for --signal."""


def render_script(plan: Plan, run_dir: str | Path, *, python: str = sys.executable) -> str:
    """The job script. `python` is used when the site's `setup.python` is empty and there is no container."""
    run_dir = Path(run_dir)
    site = plan.site
    container = site.container.runtime
    outside = site.container.agent == "outside"
    slurm = site.scheduler == "slurm"
    step = _step(plan, run_dir)
    alone = {NO_USER_SITE: "1"} if container != "none" and not outside else {}
    if container == "apptainer" and not outside and LIBRARIES in site.setup.env:
        alone |= image_libraries(site.setup.env[LIBRARIES])
    return _template("job.sh.j2").render(
        plan=plan,
        slurm=slurm,
        components=[sorted(part) for part in _components(plan, run_dir)] if slurm else [],
        het=bool(plan.components),
        layout=layout_line(plan),
        run_dir=str(run_dir),
        kill_wait=site.slurm.kill_wait,
        rendezvous_timeout=RENDEZVOUS_TIMEOUT,
        modules=site.setup.modules,
        setup=site.setup.script.rstrip("\n"),
        env=sorted({**alone, **site.setup.env}.items()),
        python=python_on_nodes(plan, python),
        container=container,
        inside=apptainer_words(plan, run_dir) if container == "apptainer" and not outside else [],
        outside=outside,
        hides_devices=hides_devices(plan),
        foreign=_foreign(plan) if container != "none" and not outside else (),
        step=["srun", *step],
        head_step=[*_head_step(plan), *pyxis_words(plan, run_dir)] if container == "pyxis" else [],
        mpi=site.slurm.mpi,
        transports=_transports(plan),
        preflight=has_preflight(plan),
        preflight_wait=PREFLIGHT_WAIT,
    )


def python_on_nodes(plan: Plan, python: str) -> str:
    """The interpreter on the nodes: the site's, the image's, or `python` of the launch."""
    if plan.site.setup.python:
        return Expanding(plan.site.setup.python)
    container = plan.site.container
    return python if container.runtime == "none" or container.agent == "outside" else "python3"


def _foreign(plan: Plan) -> tuple[str, ...]:
    """What must not reach the image. LD_LIBRARY_PATH Apptainer itself may need, and keeps outside."""
    kept = set(plan.site.setup.env)
    if plan.site.container.runtime == "apptainer":
        kept.add(LIBRARIES)
    return tuple(name for name in FOREIGN if name not in kept)


def _template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(resources("templates")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
        # Jinja's own comments begin like bash's ${#array[@]}.
        comment_start_string="{=",
        comment_end_string="=}",
    )
    environment.filters |= {
        "quote": quoting.quote,
        "words": quoting.words,
        "directive": quoting.directive,
        "comment": quoting.comment,
    }
    return environment.get_template(name)


def _transports(plan: Plan) -> tuple[str, ...]:
    if plan.site.slurm.mpi == "none":
        return ("tcp", "file")
    return ("mpi", "tcp", "file")


def _components(plan: Plan, run_dir: Path) -> Iterator[list[str]]:
    """Options of sbatch for the job, or for each component of a heterogeneous one.

    Most are said for each: which ones the first hands on differs between versions of Slurm. Names of files
    are the first one's alone.
    """
    for number, part in enumerate(plan.parts):
        slurm = plan.site.with_nodes(part.node_type).slurm if plan.components else plan.site.slurm
        first = list(_job_directives(plan, run_dir)) if number == 0 else []
        yield [*first, *_directives(plan, slurm, part)]


def _job_directives(plan: Plan, run_dir: Path) -> Iterator[str]:
    yield f"--job-name={plan.name}"
    # `%` starts a replacement such as %j in the name of an output file.
    yield f"--output={str(run_dir / 'logs' / 'job.log').replace('%', '%%')}"
    yield "--open-mode=append"


def _directives(plan: Plan, slurm: SlurmSite, part: Component) -> Iterator[str]:
    yield f"--nodes={part.nodes}"
    yield f"--ntasks={part.nodes}"
    yield "--ntasks-per-node=1"
    yield f"--time={duration(plan.walltime)}"
    yield f"--signal=B:TERM@{signal_time(plan)}"
    yield "--no-kill"
    yield "--requeue" if slurm.requeue else "--no-requeue"
    yield from gpu_request(plan.device, slurm, part.slots_per_node)
    for name in ("partition", "account", "qos", "constraint", "reservation"):
        value = getattr(slurm, name)
        if value is not None:
            yield f"--{name}={value}"
    if slurm.exclusive:
        yield "--exclusive"
    if slurm.memory is not None:
        yield f"--mem={slurm.memory}"
    if slurm.cpus_per_task is not None:
        yield f"--cpus-per-task={slurm.cpus_per_task}"
    segment = segment_nodes(plan)
    if segment is not None:
        yield f"--segment={segment}"
    yield from slurm.extra


def signal_time(plan: Plan) -> int:
    """Seconds before the end at which Slurm sends TERM: time to drain, and to end the engines.

    Never more than three quarters of the walltime, or the job would begin by draining.
    """
    wanted = plan.model.drain + plan.site.slurm.kill_wait + DRAIN_MARGIN
    return min(wanted, plan.walltime * 3 // 4, _LARGEST_SIGNAL_TIME)


def segment_nodes(plan: Plan) -> int | None:
    """Nodes that must be in one block; None where that says nothing, and where that many are no block.

    All of a disaggregated job that fits into one NVLink domain, for KV blocks cross NVLink between any two
    of its nodes; else the fewest that cut the job evenly, and no replica. (sbatch(1), --segment: the number
    of nodes must be a multiple of the segment, and a segment is at most a block.)
    """
    if not plan.site.slurm.segment:
        return None
    domain = plan.site.node.nvlink_domain_nodes
    if plan.disaggregated and 1 < plan.nodes <= domain:
        return plan.nodes
    spans = [(replica.nodes[0], replica.nodes[-1]) for replica in plan.replicas if len(replica.nodes) > 1]
    if not spans:
        return None
    most = plan.site.node.nvlink_domain_nodes if plan.site.node.nvlink_domain_nodes > 1 else plan.nodes
    return next(
        (
            size
            for size in range(2, min(most, plan.nodes) + 1)
            if plan.nodes % size == 0 and all(first // size == last // size for first, last in spans)
        ),
        None,
    )


def _step(plan: Plan, run_dir: Path) -> list[str]:
    """Flags of every step that runs once per node."""
    slurm = plan.site.slurm
    if plan.components:
        # Without numbers: srun takes each component's from the job. Ranks follow the order of the groups.
        size = [f"--het-group=0-{len(plan.components) - 1}"]
    else:
        size = [f"--nodes={plan.nodes}", f"--ntasks={plan.nodes}"]
    flags = [*size, "--ntasks-per-node=1", "--cpu-bind=none"]
    if slurm.cpus_per_task is not None:
        # Since Slurm 22.05 srun does not take it from the job.
        flags.append(f"--cpus-per-task={slurm.cpus_per_task}")
    if plan.site.container.runtime == "pyxis":
        flags += pyxis_words(plan, run_dir)
    return flags


def _head_step(plan: Plan) -> list[str]:
    flags = ["--overlap", "--nodes=1", "--ntasks=1", "--mpi=none", "--cpu-bind=none"]
    if plan.device == "cuda" and plan.site.slurm.gpu_request == "gres":
        flags.append("--gres=none")
    return flags
