"""Print how to reach a run's endpoint: its address, where the key is, a tunnel, and clients to paste."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from .arguments import Parser, add_json, add_run
from .named import named_run, plan_of
from .output import print_json

if TYPE_CHECKING:
    from ..plan.plan import Plan
    from ..rundir.runs import Run


def add_arguments(parser: Parser) -> None:
    add_run(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..control import endpoint

    run = named_run(args.run)
    endpoint(run)  # says why there is none
    plan = plan_of(run)
    if args.json:
        print_json({"name": run.record.run_id, "endpoint": ready_document(run, plan)})
    else:
        print(ready_text(run, plan))
    return 0


def ready_text(run: Run, plan: Plan) -> str:
    """The READY block. Raises RunError when there is no endpoint."""
    from ..control import endpoint
    from ..render.ready import Endpoint, ready_block

    found = endpoint(run)
    end = found.get("end_time")
    return ready_block(
        Endpoint(
            url=found["url"],
            host=found["host"],
            port=found["port"],
            served_name=found["served_name"],
            key_file=found.get("key_file"),
            name=run.record.run_id,
            user=run.record.user,
            login_host=plan.site.login.host,
            ready_seconds=found.get("ready_seconds"),
            left=None if end is None else int(end - time.time()),
        )
    )


def ready_document(run: Run, plan: Plan) -> dict[str, Any]:
    """What endpoint.json says, and the tunnel. The key itself is never printed."""
    from ..control import endpoint

    return {**endpoint(run), "login_host": plan.site.login.host}
