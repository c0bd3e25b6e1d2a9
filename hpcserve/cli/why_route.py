"""Print why requests went where they went: the workers that were weighed, and what each would have cost.

Costs are milliseconds until the answer would have begun; the lowest wins. A router remembers its last two
thousand requests, and tells a user's key about that user's own.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from ..errors import RunError, UsageError
from .arguments import Parser, add_json, positive
from .named import named_run
from .output import print_json, table

_PATIENCE = 10.0
_MOST = 200


def add_arguments(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", nargs="?", help="a run's name, its beginning, or a job id")
    parser.add_argument("--url", metavar="URL", help="a router that is no run's, http://HOST:PORT")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="the key to ask with")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--request-id", metavar="ID", help="the request of this x-request-id")
    which.add_argument(
        "--last", type=positive, default=1, metavar="N", help="the last N requests (default: 1)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if (args.run is None) == (args.url is None):
        raise UsageError("name either a RUN, or a router with --url", hint="`hpcserve ls` lists your runs")
    if args.last > _MOST:
        raise UsageError(f"--last is {args.last}", hint=f"at most {_MOST} at a time")
    url, key_file = _endpoint(args)
    query = {"request_id": args.request_id} if args.request_id is not None else {"limit": str(args.last)}
    found = decisions(url, key_file, query)
    if args.json:
        print_json({"requests": found})
        return 0
    if not found:
        what = f"request {args.request_id!r}" if args.request_id is not None else "any request"
        raise RunError(
            f"the router remembers no decision about {what}",
            hint="it keeps the last two thousand requests, and those it refused itself have none",
        )
    # Oldest first, so that the newest is next to the prompt.
    print("\n\n".join(render(request) for request in reversed(found)))
    return 0


def _endpoint(args: argparse.Namespace) -> tuple[str, Path | None]:
    if args.url is not None:
        base = args.url if "://" in args.url else f"http://{args.url}"
        return base.rstrip("/").removesuffix("/v1"), args.key_file
    from ..control import endpoint

    where = endpoint(named_run(args.run))
    key_file = args.key_file or (Path(where["key_file"]) if where.get("key_file") else None)
    return str(where["url"]).rstrip("/").removesuffix("/v1"), key_file


def decisions(url: str, key_file: Path | None, query: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the router at `url` says, the newest request first. Raises RunError and StorageError."""
    request = urllib.request.Request(f"{url}/v1/hpcserve/decisions?{urlencode(query)}")
    if key_file is not None:
        from ..rundir.runs import read_key

        request.add_header("Authorization", f"Bearer {read_key(key_file)}")
    # A router on a cluster is never behind the proxy that HTTP_PROXY names.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_PATIENCE) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]
            return found
    except urllib.error.HTTPError as error:
        with error:
            said = _message(error.read())
        hint = "--key-file FILE names a key that is good there" if error.code == 401 else None
        raise RunError(f"the router at {url} answered {error.code}: {said}", hint=hint) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"the router at {url} gives no decisions: {error}",
            hint="is this a host of the same cluster, and the URL a router's?",
        ) from error


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")


def render(request: Mapping[str, Any]) -> str:
    """One request as text: a line about it, and a table for each time workers were chosen."""
    when = time.strftime("%H:%M:%S", time.localtime(request["time"]))
    user = f" of {request['user']}" if request["user"] else ""
    status = request["status"] or "none, the client left"
    lines = [f"{request['request_id']}  {when}  {request['path']}{user}  status {status}"]
    if request["retries"] or request["migrations"]:
        lines.append(f"tried again {request['retries']} times, moved {request['migrations']} times")
    for number, decision in enumerate(request["decisions"], 1):
        lines += ["", *_decision(number, len(request["decisions"]), decision)]
    return "\n".join(lines)


def _decision(number: int, count: int, decision: Mapping[str, Any]) -> list[str]:
    prefill, answering = decision["prefill"], decision["worker"]
    first = f"choice {number} of {count}: " if count > 1 else ""
    where = f"{prefill} computes the prompt, {answering} answers" if prefill else f"{answering} does it all"
    because = f" ({decision['reason']})" if decision["reason"] else ""
    lines = [
        f"{first}{where}{because}",
        f"policy {decision['policy']}, {decision['cached_tokens']} tokens of the prompt cached and"
        f" {decision['uncached_tokens']} to compute, decided in {decision['decision_us']:.0f} µs",
    ]
    candidates = decision["candidates"]
    if candidates:
        lines.append(_table(candidates, f"{prefill}+{answering}" if prefill else answering))
        local = _why_local(candidates, prefill)
        if local:
            lines.append(local)
    return lines


def _table(candidates: Sequence[Mapping[str, Any]], winner: str) -> str:
    names: list[str] = []
    for candidate in candidates:
        names += [name for name in candidate["terms"] if name not in names]
    rows = [
        [
            ("* " if candidate["worker"] == winner else "  ") + candidate["worker"],
            _ms(candidate["cost"]),
            *(_ms(candidate["terms"].get(name)) for name in names),
            str(candidate["cached_tokens"]),
        ]
        for candidate in candidates
    ]
    return table(["  worker", "cost ms", *(name.replace("_", " ") for name in names), "cached tokens"], rows)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else "not possible" if seconds == -1 else f"{seconds * 1e3:.1f}"


def _why_local(candidates: Sequence[Mapping[str, Any]], prefill: str | None) -> str | None:
    """The other way to compute the prompt, and what it would have cost more."""
    pairs = [candidate for candidate in candidates if "+" in candidate["worker"]]
    alone = [candidate for candidate in candidates if "+" not in candidate["worker"]]
    if not pairs or not alone:
        return None
    best, other = (pairs[0], alone[0]) if prefill else (alone[0], pairs[0])
    more = (other["cost"] - best["cost"]) * 1e3
    here, there = ("a prefill worker", "the decode worker") if prefill else (
        "the decode worker", "a prefill worker",
    )  # fmt: skip
    return f"prompt on {here}: on {there} ({other['worker']}) it would cost {more:.1f} ms more"
