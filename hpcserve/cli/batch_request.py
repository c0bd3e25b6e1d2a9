"""What a batch command line asks of a dataset, and its beginning."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .arguments import Parser, positive
from .output import say

if TYPE_CHECKING:
    from ..batch.begin import BatchRequest, Begun, Model
    from ..plan.plan import Plan
    from ..slurm.function_job import FunctionJob
    from ..slurm.scheduler import JobState

YAML = (".yaml", ".yml")
INPUTS = (
    "the dataset: .jsonl, .csv, .parquet, .arrow, .gz and .zst, directories of Hugging Face datasets,"
    " patterns"
)


def add_prompts(parser: Parser) -> None:
    """How rows become requests."""
    source = parser.add_argument_group("prompts (none of these for OpenAI batch lines)")
    source.add_argument(
        "--template", type=Path, metavar="FILE", help="Jinja2 of the user's message, from columns"
    )
    source.add_argument("--system", metavar="TEXT", help="Jinja2 of the system message")
    source.add_argument("--messages-column", metavar="NAME", help="column with a chat's messages")
    source.add_argument("--prompt-column", metavar="NAME", help="column with text to be completed")
    source.add_argument(
        "--sampling", metavar="KEY=VALUE", action="append", default=[],
        help="a member of every request, such as max_tokens=512 or temperature=0; may be repeated",
    )  # fmt: skip
    source.add_argument(
        "--samples", type=positive, default=1, metavar="N", help="answers to each row (default: 1)"
    )
    source.add_argument(
        "--seed", type=int, metavar="N", help="give each request a seed of its own, made of N and its row"
    )


def batch_request(args: argparse.Namespace, data: Sequence[str]) -> BatchRequest:
    from ..batch.begin import BatchRequest
    from ..config.document import read_text

    return BatchRequest(
        inputs=data,
        output=args.output,
        template=None if args.template is None else read_text(args.template, what="--template"),
        system=args.system,
        prompt_column=args.prompt_column,
        messages_column=args.messages_column,
        sampling=_sampling(args.sampling),
        samples=args.samples,
        seed=args.seed,
        limit=args.limit,
        sample=args.sample,
        format=args.format,
        order=args.order,
    )


def model_of(plan: Plan) -> Model:
    from ..batch.begin import Model

    spec = plan.model
    return Model(served_name=plan.served_name, path=spec.model, revision=spec.revision)


def begin_batch(request: BatchRequest, model: Model) -> Begun:
    """Planned where the command runs."""
    from ..batch.begin import begin

    def on_row(row: int) -> None:
        if row and row % 100_000 == 0:
            say(f"planning: {row:,} rows")

    return _say_begun(begin(request, model, on_row))


def begin_apart(request: BatchRequest, model: Model, plan: Plan, runs: Path) -> Begun:
    """Planned in a job, while this shows how it waits; what was planned before is taken up here."""
    from ..batch import apart
    from ..batch.begin import is_planned

    if is_planned(request):
        return begin_batch(request, model)

    def on_submit(job: FunctionJob, folder: Path) -> None:
        say(f"planning in job {job.job_id} on {plan.site.slurm.cpu_partition}; its log is in {folder}")

    def on_change(state: JobState) -> None:
        say(f"job {state.job_id}: {state.words}")

    return _say_begun(apart.plan(request, model, plan.site, plan.name, runs, on_submit, on_change))


def _say_begun(begun: Begun) -> Begun:
    manifest = begun.manifest
    counted = "" if manifest.tokens_exact else "about "
    what = "goes on with" if begun.resumed else "planned"
    what = f"{begun.directory.out} is complete:" if begun.complete else what
    say(
        f"{what} {manifest.rows:,} rows, {manifest.items:,} requests, {counted}{manifest.prompt_tokens:,}"
        " prompt tokens"
    )
    if begun.forgiven:
        say(f"{begun.forgiven:,} of them failed when too many did, and are sent again")
    return begun


def _sampling(pairs: Sequence[str]) -> dict[str, Any]:
    """Values are JSON where they are that, else text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UsageError(
                f"--sampling {pair!r} is not KEY=VALUE", hint="for example --sampling max_tokens=512"
            )
        if name in found:
            raise UsageError(f"--sampling gives {name} twice", hint="leave one of them out")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found
