"""Start an endpoint: plan, check, submit, and show the way to READY.

Ctrl-C ends the watching, not the job.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HpcserveError, JobError
from .arguments import Parser, add_json
from .output import print_json, say, warn
from .request import add_request, prepare

if TYPE_CHECKING:
    from ..launch import Prepared
    from ..rundir.runs import Run
    from .ladder import Progress


def add_arguments(parser: Parser) -> None:
    add_request(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan, the job script and every engine's command"
    )
    parser.add_argument(
        "--output-script", type=Path, metavar="DIR", help="write what --dry-run prints as files, and end"
    )
    parser.add_argument("--no-wait", action="store_true", help="submit and end")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    prepared = prepare(args)
    if args.dry_run or args.output_script is not None:
        return _preview(prepared, args)
    return _launch(prepared, args)


def _preview(prepared: Prepared, args: argparse.Namespace) -> int:
    from ..launch import files, write_files

    texts = files(prepared)
    if args.output_script is not None:
        for path in write_files(args.output_script, texts):
            say(f"wrote {path}")
    if args.json:
        print_json({**_summary(prepared), "files": texts})
        return 0
    if not args.dry_run:
        return 0
    from ..render.summary import plan_table

    print(plan_table(prepared.plan))
    for name, text in texts.items():
        if name != "plan.json":
            print(f"\n# ---- {name} ----\n{text}", end="")
    return 0


def _launch(prepared: Prepared, args: argparse.Namespace) -> int:
    from ..launch import submit
    from ..render.summary import cost_line

    _warn_of_variables(prepared)
    _warn_of_image(prepared)
    _warn_of_segments(prepared)
    say(f"cost: {cost_line(prepared.plan)}")
    run = submit(prepared, args.command_line)
    name = run.record.run_id
    prepared = replace(prepared, run_id=name)
    say(f"submitted {name} as job {run.record.job_id}; run directory: {run.directory.path}")
    _tell_of_names(run)
    if args.no_wait:
        say(f"watch it with `hpcserve status {name}`; end it with `hpcserve stop {name}`")
        if args.json:
            print_json({**_summary(prepared), "job_id": run.record.job_id, "state": "submitted"})
        return 0
    try:
        progress = _watch(run, prepared)
    except KeyboardInterrupt:
        say(f"\n{name} still runs. Look at it: `hpcserve status {name}`; end it: `hpcserve stop {name}`")
        raise
    except HpcserveError:
        say(f"{name} can't be watched any more; its job {run.record.job_id} is not affected by that")
        raise
    if progress.ready is None:
        raise _failure(run, progress)
    _print_ready(prepared, run, as_json=args.json)
    return 0


def _tell_of_names(run: Run) -> None:
    """Say what is surprising about the name that other commands know the run by."""
    record = run.record
    if record.run_id != record.name:
        say(f"{record.name!r} was taken, so this run is {record.run_id!r}; `{record.name}` alone means "
            "the newest run of that name")  # fmt: skip
    from ..launch import known_roots

    roots, _ = known_roots(os.environ)
    path = run.directory.path
    if path.parent.resolve() not in [root.resolve() for root in roots]:
        warn(
            f"other commands don't look in {path.parent}: it is not of a site that is found by name",
            f"name the directory, as in `hpcserve status {path}`, or `export HPCSERVE_RUNS={path.parent}`",
        )


def _watch(run: Run, prepared: Prepared) -> Progress:
    from .live import follow, view

    with view() as shown:
        return follow(run, prepared.plan, shown)


def _warn_of_variables(prepared: Prepared) -> None:
    if prepared.plan.site.scheduler != "slurm":
        return
    from ..slurm.sbatch import overriding_variables

    for name, value in overriding_variables(os.environ).items():
        warn(
            f"{name}={value} in your environment is not used: the job script says all there is to say",
            "use a flag such as --partition or --account, or the site config",
        )


def _warn_of_image(prepared: Prepared) -> None:
    """A file may be on the nodes only, so this is no error."""
    from ..config.images import image_path, reference

    container = prepared.plan.site.container
    if container.runtime == "none" or container.image is None or reference(container.image) is not None:
        return
    path = os.path.expandvars(image_path(container))
    if not os.path.exists(path):
        warn(
            f"the image {path} does not exist on this host",
            "is that the name of a file on the nodes? `container.image` of the site says it",
        )


def _warn_of_segments(prepared: Prepared) -> None:
    from ..render.script import segment_nodes

    plan = prepared.plan
    widest = max(len(replica.nodes) for replica in plan.replicas)
    if plan.site.slurm.segment and widest > 1 and segment_nodes(plan) is None:
        warn(
            f"`slurm.segment` can't be kept: no division of {plan.nodes} nodes leaves every replica whole,"
            f" so Slurm may put a replica's {widest} nodes into several blocks",
            f"ask for a multiple of {widest} nodes, with replicas that fill each {widest} of them",
        )


def _failure(run: Run, progress: Progress) -> JobError:
    """The job's own last word; without one, what the scheduler and the logs say: as `status` tells it."""
    from ..control import failure, overview
    from ..rundir.logs import lines_that_matter

    [seen], _ = overview([run])
    if progress.failed is None and seen.state == "stopped":
        return JobError(
            f"run {run.record.run_id} was stopped before it was READY: {progress.stopped or seen.detail}",
            hint="launch it again, if that was not meant",
        )
    if progress.failed is None:
        for line in lines_that_matter(run.directory.logs):
            say(f"  {line}")
    return failure(run, seen)


def _print_ready(prepared: Prepared, run: Run, *, as_json: bool) -> None:
    from .connect import ready_document, ready_text

    if as_json:
        print_json(
            {
                **_summary(prepared),
                "job_id": run.record.job_id,
                "state": "ready",
                "endpoint": ready_document(run, prepared.plan),
            }
        )
    else:
        print(ready_text(run, prepared.plan))


def _summary(prepared: Prepared) -> dict[str, Any]:
    from ..config.load import to_json

    plan = prepared.plan
    return {
        "name": prepared.run_id,
        "directory": str(prepared.run_path),
        "site": plan.site.name,
        "gpus": plan.gpus,
        "gpu_hours": plan.gpu_hours,
        "plan": to_json(plan),
    }
