"""Make, list and revoke keys for people who share your endpoints.

    hpcserve key create NAME [limits]   prints a new key, once: only its hash is stored
    hpcserve key list
    hpcserve key revoke NAME|ID         all keys of that name, or one key

Keys are good on every run of yours whose runs directory they are in, and running endpoints know of
a change within seconds. Several keys may have one name. To let others of a Unix group make keys, too:
`chgrp GROUP DIR && chmod 2770 DIR`.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .arguments import Parser, add_json, positive
from .output import print_json, say, table, warn

if TYPE_CHECKING:
    from ..router.keys.store import KeyRecord, KeyStore

ACTIONS = ("create", "list", "revoke")
_LIMITS = ("concurrent", "tokens_per_minute", "tokens", "models", "priority", "weight")


def add_arguments(parser: Parser) -> None:
    parser.add_argument("action", metavar="create|list|revoke", choices=ACTIONS, help="what to do")
    parser.add_argument("name", nargs="?", metavar="NAME", help="whose key; for revoke also a key's id")
    parser.add_argument("--concurrent", type=positive, metavar="N", help="requests at one time")
    parser.add_argument(
        "--tokens-per-minute", type=positive, metavar="N", help="tokens of prompts and answers in a minute"
    )
    parser.add_argument(
        "--tokens", type=positive, metavar="N", help="tokens of prompts and answers in all, over all runs"
    )
    parser.add_argument("--models", type=_names, metavar="A,B", help="served models and LoRAs it may use")
    parser.add_argument(
        "--priority",
        choices=("interactive", "batch"),
        help="batch requests wait while interactive ones do (default: interactive)",
    )
    parser.add_argument(
        "--weight", type=_weight, metavar="W", help="its part of a busy endpoint, next to others (default: 1)"
    )
    parser.add_argument(
        "--keys", type=Path, metavar="DIR", help="directory of keys (default: .keys in the runs directory)"
    )
    parser.add_argument(
        "--site",
        metavar="NAME|FILE",
        help="site whose runs directory is meant (default: $HPCSERVE_SITE, or by host name)",
    )
    add_json(parser)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of names, such as `llama-70b,my-lora`")
    return names


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0.0 < weight <= 1000.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, and at most 1000")
    return weight


def run(args: argparse.Namespace) -> int:
    from ..router.keys.store import KeyStore

    _check(args)
    store = KeyStore(_directory(args))
    match args.action:
        case "create":
            return _create(store, args)
        case "revoke":
            return _revoke(store, args.name)
        case _:
            return _list(store, args.json)


def _check(args: argparse.Namespace) -> None:
    if args.action != "create":
        for name in _LIMITS:
            if getattr(args, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise UsageError(
                    f"{flag} is for `hpcserve key create`", hint="revoke the key, and make another"
                )
    if args.action == "list" and args.name is not None:
        raise UsageError(
            f"`hpcserve key list` takes no name, such as {args.name!r}", hint="it lists all keys"
        )
    if args.action != "list" and args.json:
        raise UsageError("--json is for `hpcserve key list`", hint="`create` prints the key and nothing else")
    if args.action != "list" and args.name is None:
        raise UsageError(
            f"`hpcserve key {args.action}` needs a name", hint=f"hpcserve key {args.action} alice"
        )


def _directory(args: argparse.Namespace) -> Path:
    if args.keys is not None:
        return Path(os.path.abspath(args.keys))
    from ..config.sites import find_site
    from ..rundir.layout import KEYS
    from ..rundir.runs import RUNS_VARIABLE, runs_root

    if os.environ.get(RUNS_VARIABLE):
        return runs_root("", os.environ) / KEYS
    site = find_site(args.site, environ=os.environ, hostname=os.uname().nodename).value
    return runs_root(site.storage.runs, os.environ) / KEYS


def _create(store: KeyStore, args: argparse.Namespace) -> int:
    from ..router.keys.store import NAME, RESERVED

    name = args.name
    if not NAME.fullmatch(name) or name in RESERVED:
        raise UsageError(
            f"{name!r} can't be the name of a key: it must be 1 to 64 letters, digits or one of ._-@+, "
            f"begin with a letter or digit, and not be {' or '.join(sorted(RESERVED))}",
            hint="use the user name of whoever gets the key",
        )
    fields = {limit: getattr(args, limit) for limit in _LIMITS if getattr(args, limit) is not None}
    record, key = store.create(name, created_by=_user(), **fields)
    print(key)
    say(f"The key is shown this once. Its id is {record.id}, {_limits(record)}; hash in {store.directory}")
    return 0


def _revoke(store: KeyStore, name: str) -> int:
    revoked = store.revoke(name)
    if not revoked:
        say(f"{name} was revoked before")
    for record in revoked:
        say(f"revoked {record.id} of {record.name}; running endpoints refuse it within seconds")
    return 0


def _list(store: KeyStore, as_json: bool) -> int:
    records, errors = store.read()
    for error in errors.values():
        warn(error.message, error.hint)
    found = sorted(records.values(), key=lambda record: record.created)
    if as_json:
        print_json({"directory": str(store.directory), "keys": [_row(record) for record in found]})
        return 0
    if not found:
        say(f"no keys in {store.directory}")
        say("begin with: hpcserve key create NAME")
        return 0
    cells = [
        (
            record.id,
            record.name,
            time.strftime("%Y-%m-%d", time.localtime(record.created)),
            "revoked" if record.revoked is not None else "good",
            _limits(record),
        )
        for record in found
    ]
    print(table(("ID", "NAME", "CREATED", "STATE", "LIMITS"), cells))
    return 0


def _row(record: KeyRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "name": record.name,
        "created": record.created,
        "created_by": record.created_by,
        "revoked": record.revoked,
        **{limit: getattr(record, limit) for limit in _LIMITS},
    }


def _limits(record: KeyRecord) -> str:
    parts = []
    if record.concurrent is not None:
        parts.append(f"{record.concurrent} at a time")
    if record.tokens_per_minute is not None:
        parts.append(f"{record.tokens_per_minute:,} tokens/min")
    if record.tokens is not None:
        parts.append(f"{record.tokens:,} tokens")
    if record.models is not None:
        parts.append(f"only {', '.join(record.models)}")
    if record.priority != "interactive":
        parts.append(record.priority)
    if record.weight != 1.0:
        parts.append(f"weight {record.weight:g}")
    return "; ".join(parts) or "no limits"


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
