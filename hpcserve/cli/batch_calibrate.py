"""Measure which layout answers a dataset faster: prefill and decode apart, or engines that do both.

A sample of the rows is answered twice, each time by as many nodes of the same model, as a batch of its own
below the output directory. The same command again goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MORE_TO_DO, UsageError
from .arguments import Parser, add_json, positive
from .batch_request import INPUTS, YAML, add_prompts, batch_request, begin_batch, model_of
from .output import print_json, say, table
from .request import add_job, request_of

if TYPE_CHECKING:
    from ..batch.begin import Begun
    from ..launch import Prepared
    from ..rundir.runs import Run

_ROWS = 1000


def add_arguments(parser: Parser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="model.yaml DATA", help=f"what answers, then {INPUTS}")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="where answers go")
    parser.add_argument(
        "--sample", type=positive, default=_ROWS, metavar="N",
        help=f"rows, chosen at random by --seed (default: {_ROWS}, or all there are)",
    )  # fmt: skip
    add_prompts(parser)
    add_job(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..batch.inputs.extras import need

    need("numpy", "`hpcserve batch calibrate`")
    from ..batch import calibration, history
    from ..batch.inputs.files import open_inputs

    if len(args.inputs) < 2 or not args.inputs[0].endswith(YAML):
        raise UsageError(
            "a calibration needs a model.yaml and a dataset",
            hint="`hpcserve batch calibrate model.yaml data.jsonl -o out/`",
        )
    args.model, data = Path(args.inputs[0]), args.inputs[1:]
    prepared = _prepare(args)
    rows = sum(1 for _ in open_inputs(data).rows())
    args.sample = args.sample if args.sample < rows else None
    args.limit, args.format, args.order = None, None, "input"
    request = batch_request(args, data)
    begun = {
        name: begin_batch(replace(request, output=args.output / name), model_of(one.plan))
        for name, one in prepared.items()
    }
    if not _carry_out(args, prepared, begun):
        say("there is more to do: give the same command again")
        if args.json:
            print_json({"state": "unfinished", "output": str(args.output.absolute())})
        return MORE_TO_DO
    rates = {name: calibration.rate(history.read(one.directory)) for name, one in begun.items()}
    verdict = calibration.verdict(rates)
    if args.json:
        print_json({"state": "complete", "layouts": rates, "verdict": verdict})
        return 0
    _show(rates)
    print(verdict)
    return 0


def _show(rates: Mapping[str, Mapping[str, Any]]) -> None:
    header = ("LAYOUT", "ROWS/S", "TOKENS/S", "ROWS PER GPU-HOUR")
    lines = []
    for name, found in rates.items():
        per_hour = found["rows_per_gpu_hour"]
        lines.append(
            (
                name,
                f"{found['rows_per_second']:,.2f}",
                f"{found['tokens_per_second']:,.0f}",
                "-" if per_hour is None else f"{per_hour:,.0f}",
            )
        )
    print(table(header, lines))
    for name, found in rates.items():
        if found["advice"] is not None:
            print(f"{name}: {found['advice']}")


def _prepare(args: argparse.Namespace) -> dict[str, Prepared]:
    """Both layouts, planned, before anything is submitted. Raises ConfigError and PlanError."""
    from ..batch.driver import ERROR_RATE
    from ..launch import prepare
    from ..plan.layouts import layouts
    from ..plan.plan import BatchPlan

    environ, host = os.environ, os.uname().nodename
    request = request_of(args)
    first = prepare(request, environ, host).plan
    found = {}
    for name, pools in layouts(first).items():
        output = (args.output / name).absolute()
        batch = BatchPlan(output=str(output), max_error_rate=ERROR_RATE)
        one = replace(request, batch=batch, name=f"{first.name}-{name}")
        if pools is not None:
            one = replace(one, pools=pools, nodes=first.nodes, prefill=None, decode=None)
        found[name] = prepare(one, environ, host)
    return found


def _carry_out(args: argparse.Namespace, prepared: dict[str, Prepared], begun: dict[str, Begun]) -> bool:
    """Submit what is not complete, and watch. False: there is more to do."""
    from ..launch import submit
    from ..render.summary import cost_line
    from .batch_watch import watch

    # Without a queue both would share one machine.
    at_once = all(one.plan.site.scheduler == "slurm" for one in prepared.values())
    runs: dict[str, Run] = {}

    def send(name: str) -> None:
        say(f"{name}: {cost_line(prepared[name].plan)}")
        runs[name] = submit(prepared[name], args.command_line)
        record = runs[name].record
        say(f"submitted {record.run_id} as job {record.job_id}; run directory: {runs[name].directory.path}")

    left = [name for name, one in begun.items() if not one.complete]
    if at_once:
        for name in left:
            send(name)
    complete = True
    for name in left:
        if name not in runs:
            send(name)
        complete &= watch([runs[name]], prepared[name].plan, begun[name])
    return complete
