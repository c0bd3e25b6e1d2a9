"""Plan -> job script. Pure: the same plan and paths give the same bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from ..config.resources import resources
from ..plan.explain import duration
from ..plan.plan import RENDEZVOUS_TIMEOUT, Plan
from ..plan.preflight import has_preflight
from . import quoting
from .containers import FOREIGN, NO_USER_SITE, apptainer_words, pyxis_words
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
    return _template("job.sh.j2").render(
        plan=plan,
        slurm=slurm,
        directives=sorted(_directives(plan, run_dir)) if slurm else [],
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
        foreign=_foreign(plan) if container != "none" and not outside else (),
        step=["srun", *step],
        head_step=[*_head_step(plan), *pyxis_words(plan, run_dir)] if container == "pyxis" else [],
        mpi=site.slurm.mpi,
        transports=_transports(plan),
        preflight=has_preflight(plan),
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
        kept.add("LD_LIBRARY_PATH")
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


def _directives(plan: Plan, run_dir: Path) -> Iterator[str]:
    slurm = plan.site.slurm
    yield f"--job-name={plan.name}"
    yield f"--nodes={plan.nodes}"
    yield f"--ntasks={plan.nodes}"
    yield "--ntasks-per-node=1"
    yield f"--time={duration(plan.walltime)}"
    # `%` starts a replacement such as %j in the name of an output file.
    yield f"--output={str(run_dir / 'logs' / 'job.log').replace('%', '%%')}"
    yield "--open-mode=append"
    yield f"--signal=B:TERM@{signal_time(plan)}"
    yield "--no-kill"
    yield "--requeue" if slurm.requeue else "--no-requeue"
    yield from gpu_request(plan)
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
    """Nodes that must be in one block; None when that says nothing.

    All of a disaggregated job that fits into one NVLink domain, for KV blocks cross NVLink between any two
    of its nodes; else those of the widest replica. Slurm wants a divisor of the nodes, at most a block
    (sbatch(1), --segment), and a replica wider than a domain spans several anyway.
    """
    if not plan.site.slurm.segment:
        return None
    domain = plan.site.node.nvlink_domain_nodes
    if plan.disaggregated and 1 < plan.nodes <= domain:
        return plan.nodes
    widest = max(len(replica.nodes) for replica in plan.replicas)
    if widest == 1 or plan.nodes % widest or 1 < domain < widest:
        return None
    return widest


def _step(plan: Plan, run_dir: Path) -> list[str]:
    """Flags of every step that runs once per node."""
    slurm = plan.site.slurm
    flags = [
        f"--nodes={plan.nodes}",
        f"--ntasks={plan.nodes}",
        "--ntasks-per-node=1",
        "--cpu-bind=none",
    ]
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
