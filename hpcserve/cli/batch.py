"""Send a whole dataset through a model: one row out for each row in, whatever is killed on the way.

The same command again goes on where the last one stopped. `hpcserve batch convert` writes the results in
another format; `hpcserve batch calibrate` measures which layout is faster.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .arguments import Parser, add_json, positive
from .batch_request import INPUTS, YAML, add_prompts, batch_request, begin_apart, begin_batch, model_of
from .output import print_json, say
from .request import add_job, prepare

if TYPE_CHECKING:
    from ..batch.begin import BatchRequest, Begun, Model
    from ..launch import Prepared
    from ..rundir.runs import Run

_SHOWN = 3
_OF_JOBS = (
    "nodes", "prefill", "decode", "walltime", "name", "site", "account", "partition", "overrides",
)  # fmt: skip


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="model.yaml DATA",
        help=f"what answers (not with --endpoint), then {INPUTS}",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="where answers go")
    parser.add_argument(
        "--endpoint", metavar="RUN", help="use a run that serves already, behind its other users"
    )
    add_prompts(parser)
    part = parser.add_argument_group("what part, and in what form")
    part.add_argument("--limit", type=positive, metavar="N", help="the first N rows")
    part.add_argument("--sample", type=positive, metavar="N", help="N rows, chosen at random by --seed")
    part.add_argument(
        "--format", choices=("openai", "jsonl", "parquet"),
        help="of the output (default: openai for its batch lines, parquet for tables, else jsonl)",
    )  # fmt: skip
    part.add_argument(
        "--order", choices=("input", "completion"), default="input", help="of the output (default: input)"
    )
    parser.add_argument(
        "--max-error-rate", type=_rate, default=0.5, metavar="PART",
        help="stop when more of the results than this are errors, such as 0.01 (default: 0.5)",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="K",
        help="jobs one after the other, each of which goes on where the last one stopped (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--parallel-jobs", type=positive, default=1, metavar="M",
        help="as many jobs at the same time, each with its K - 1 successors (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="print the first prompts and the plan, and end"
    )
    parser.add_argument("--no-wait", action="store_true", help="submit and end")
    add_job(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..batch.inputs.extras import need

    need("numpy", "`hpcserve batch`")
    if args.endpoint is not None:
        return _on_endpoint(args)
    if len(args.inputs) < 2 or not args.inputs[0].endswith(YAML):
        raise UsageError(
            "a batch needs a model.yaml and a dataset",
            hint="`hpcserve batch model.yaml data.jsonl -o out/`, or --endpoint RUN without a model.yaml",
        )
    args.model, data = Path(args.inputs[0]), args.inputs[1:]
    from ..plan.plan import BatchPlan

    prepared = prepare(
        args, BatchPlan(output=str(args.output.absolute()), max_error_rate=args.max_error_rate)
    )
    request, model = batch_request(args, data), model_of(prepared.plan)
    if args.dry_run:
        return _preview(request, model, prepared, as_json=args.json)
    jobs = {"--jobs": args.jobs, "--parallel-jobs": args.parallel_jobs}
    several = next((f"{flag} {count}" for flag, count in jobs.items() if count > 1), None)
    if several is not None and prepared.plan.site.scheduler != "slurm":
        raise UsageError(
            f"{several}: site {prepared.plan.site.name} has no queue in which jobs could wait",
            hint="leave it out; the same command again goes on with the batch",
        )
    return _carry_out(args, prepared, request, model)


def _carry_out(args: argparse.Namespace, prepared: Prepared, request: BatchRequest, model: Model) -> int:
    from ..batch import apart

    large = apart.is_large(request, prepared.plan.site)
    if large:
        begun = begin_apart(request, model, prepared.plan, prepared.root)
    else:
        begun = begin_batch(request, model)
    if begun.complete or (begun.answered and not large and _merged(begun)):
        return completed(begun, as_json=args.json)
    runs = [] if begun.answered and large else _submit(args, prepared, merge_apart=large)
    merging = None
    if large:
        after = [str(run.record.job_id) for run in runs[-args.parallel_jobs :]]
        merging = apart.merge(request, begun.directory, prepared.plan.site, prepared.plan.name, after)
        say(f"submitted the merge as job {merging.job_id}; its files are in {begun.directory.merge}")
    names = [run.record.run_id for run in runs]
    if args.no_wait:
        if names:
            say(f"watch it with `hpcserve status {names[0]}`; end it with `hpcserve stop {names[0]}`")
        if args.json:
            merge_job = None if merging is None else merging.job_id
            out = str(begun.directory.out)
            print_json({"state": "submitted", "runs": names, "merge_job": merge_job, "output": out})
        return 0
    from .batch_watch import watch, watch_merge

    if (runs and watch(runs, prepared.plan, begun)) or (merging is not None and watch_merge(merging)):
        return completed(begun, as_json=args.json)
    return unfinished(begun, as_json=args.json)


def _merged(begun: Begun) -> bool:
    """Merge what is all answered, here and now. False: there is more to do, for answers were damaged."""
    from ..batch.finish import finish
    from ..batch.merge import Unfinished

    say("all rows are answered; merging them")
    try:
        finish(begun.directory)
    except Unfinished as error:
        say(str(error))
        return False
    return True


def _preview(request: BatchRequest, model: Model, prepared: Prepared, *, as_json: bool) -> int:
    from ..batch.begin import preview
    from ..render.summary import plan_table

    shown = preview(request, model, _SHOWN)
    if as_json:
        prompts = [{**one._asdict(), "body": json.loads(one.body)} for one in shown]
        print_json({"state": "preview", "output": str(request.output.absolute()), "prompts": prompts})
        return 0
    print(plan_table(prepared.plan))
    for one in shown:
        print(f"\n# {one.place}: POST {one.path}, {one.prompt_tokens:,} prompt tokens")
        print(json.dumps(json.loads(one.body), indent=1, ensure_ascii=False))
    return 0


def _submit(args: argparse.Namespace, prepared: Prepared, *, merge_apart: bool) -> list[Run]:
    """The batch's jobs, in the order in which they can run."""
    from ..launch import submit
    from ..render.summary import cost_line

    batch = prepared.plan.batch
    assert batch is not None, "it was asked for"
    prepared = replace(prepared, plan=replace(prepared.plan, batch=replace(batch, merge_apart=merge_apart)))
    count = args.jobs * args.parallel_jobs
    say(f"cost: {cost_line(prepared.plan)}" + (f", up to {count} times" if count > 1 else ""))
    runs: list[Run] = []
    before: list[str | None] = [None] * args.parallel_jobs
    for _ in range(args.jobs):
        for lane, after in enumerate(before):
            run = submit(prepared, args.command_line, after=after)
            before[lane] = run.record.job_id
            runs.append(run)
            job, path = run.record.job_id, run.directory.path
            say(f"submitted {run.record.run_id} as job {job}; run directory: {path}")
    return runs


def _check_endpoint(args: argparse.Namespace) -> None:
    """Raises UsageError."""
    if args.inputs[0].endswith(YAML):
        raise UsageError(
            f"{args.inputs[0]} and --endpoint {args.endpoint} both say what answers",
            hint="leave one of them out",
        )
    given = {"dry_run": args.dry_run, "no_wait": args.no_wait, "jobs": args.jobs > 1}
    given["parallel_jobs"] = args.parallel_jobs > 1
    given |= {name: bool(getattr(args, name)) for name in _OF_JOBS}
    for name in given:
        if given[name]:
            flag = "--" + {"overrides": "set"}.get(name, name).replace("_", "-")
            raise UsageError(
                f"{flag} is about a job, and --endpoint uses a run that serves already, here and now",
                hint="leave one of them out",
            )


def _on_endpoint(args: argparse.Namespace) -> int:
    from ..batch.__main__ import drive
    from ..batch.apart import is_large
    from ..batch.begin import is_planned
    from ..batch.driver import Limits
    from ..batch.sending import Endpoint
    from ..control import endpoint
    from ..errors import MORE_TO_DO
    from .named import named_run, plan_of

    _check_endpoint(args)
    run = named_run(args.endpoint)
    plan = plan_of(run)
    request, model = batch_request(args, args.inputs), model_of(plan)
    if is_planned(request):
        # What is answered needs no endpoint any more.
        begun = begin_batch(request, model)
        if begun.complete or (begun.answered and _merged(begun)):
            return completed(begun, as_json=args.json)
    endpoint(run)
    Endpoint(run.directory.endpoint)  # what is wrong with it is said before anything is written
    if not is_planned(request):
        large = is_large(request, plan.site)
        runs = run.directory.path.parent
        begun = begin_apart(request, model, plan, runs) if large else begin_batch(request, model)
    status = drive(begun.directory, run.directory.endpoint, Limits(error_rate=args.max_error_rate))
    if status == MORE_TO_DO:
        return unfinished(begun, as_json=args.json)
    return completed(begun, as_json=args.json)


def unfinished(begun: Begun, *, as_json: bool) -> int:
    """Say that it is not all; the exit status for that."""
    from ..errors import MORE_TO_DO

    say("there is more to do: give the same command again")
    if as_json:
        print_json({"state": "unfinished", "output": str(begun.directory.out)})
    return MORE_TO_DO


def completed(begun: Begun, *, as_json: bool) -> int:
    """Say what came of it; 0."""
    from ..batch.finish import output_path

    path = output_path(begun.directory, begun.manifest)
    if as_json:
        print_json({"state": "complete", "output": str(path), "report": _report(begun)})
        return 0
    if begun.directory.report_text.exists():
        sys.stderr.write(begun.directory.report_text.read_text())
    print(path)
    return 0


def _report(begun: Begun) -> Any:
    from ..rundir.atomic import read_json

    return read_json(begun.directory.report) if begun.directory.report.exists() else None


def _rate(text: str) -> float:
    try:
        rate = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a part from 0 to 1, such as 0.01 or 1%")
    return rate
