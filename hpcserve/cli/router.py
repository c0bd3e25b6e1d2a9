"""Run the router alone, in the foreground, in front of engines that someone else started. Ctrl-C drains it.

A worker that does not answer leaves rotation and comes back when it does.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import ConfigError, UsageError
from .arguments import Parser, positive


def add_arguments(parser: Parser) -> None:
    for role, what in (
        ("aggregated", "engines that compute prompts and write answers"),
        ("prefill", "engines that compute prompts"),
        ("decode", "engines that write answers"),
    ):
        parser.add_argument(f"--{role}", nargs="+", default=[], metavar="URL", type=_url, help=what)
    parser.add_argument("--port", type=_port, required=True, help="port to listen on; 0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument("--key-file", type=Path, metavar="FILE", help="the key clients must send")
    keys.add_argument("--no-auth", action="store_true", help="let everyone in who can reach the port")
    parser.add_argument(
        "--keys", type=Path, metavar="DIR", help="more keys: what `hpcserve key --keys DIR` made"
    )
    parser.add_argument("--engine-key-file", type=Path, metavar="FILE", help="the key engines are sent")
    parser.add_argument("--policy", metavar="NAME", help="how workers are chosen (default: the router's)")
    parser.add_argument(
        "--processes", type=positive, default=1, metavar="N", help="router processes on the port (default: 1)"
    )
    parser.add_argument(
        "--engine",
        choices=("vllm", "sglang", "tensorrt-llm", "fake"),
        default="vllm",
        help="what they are (default: %(default)s)",
    )
    parser.add_argument(
        "--served-name", metavar="NAME", help="the model's name for clients (default: what an engine says)"
    )
    parser.add_argument(
        "--kv-events",
        nargs="+",
        default=[],
        metavar="URL=EVENTS[,REPLAY]",
        type=_kv_events,
        help="where a worker publishes its KV events: ZMQ addresses; again for each data-parallel rank",
    )
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="PEM certificate chain: speak TLS")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM private key of --tls-cert")
    parser.add_argument("--unix-socket", type=Path, metavar="PATH", help="listen on this socket as well")


def run(args: argparse.Namespace) -> int:
    from ..router.__main__ import main
    from ..rundir.atomic import write_json

    _check(args)
    with tempfile.TemporaryDirectory(prefix="hpcserve-router-") as directory:
        path = Path(directory, "router.json")
        write_json(path, configuration(args))
        return main(["--config", str(path)])


def _check(args: argparse.Namespace) -> None:
    pair = bool(args.prefill) + bool(args.decode)
    if bool(args.aggregated) == bool(pair) or pair == 1:
        raise UsageError(
            "give either --aggregated, or both --prefill and --decode",
            hint="e.g. `hpcserve router --aggregated http://127.0.0.1:8000 --port 9000 --no-auth`",
        )
    if args.keys is not None and args.no_auth:
        raise UsageError("--keys and --no-auth exclude each other", hint="leave one of them out")
    if args.key_file is None and args.keys is None and not args.no_auth:
        raise UsageError(
            "the router has no key to ask clients for",
            hint="--key-file FILE names a file with one; --no-auth lets everyone in",
        )
    if args.tls_key is not None and args.tls_cert is None:
        raise UsageError("--tls-key needs --tls-cert", hint="give the certificate's file as well")


def configuration(args: argparse.Namespace) -> dict[str, Any]:
    """The router's configuration file for these arguments."""
    workers = [
        {"name": f"{role}-{number}", "role": role, "url": url}
        for role in ("aggregated", "prefill", "decode")
        for number, url in enumerate(getattr(args, role))
    ]
    engine_key = args.engine_key_file
    found: dict[str, Any] = {
        "served_name": args.served_name or _served_name([worker["url"] for worker in workers], engine_key),
        "engine": args.engine,
        "host": args.host,
        "port": args.port,
        "api_key_file": _absolute(args.key_file),
        "keys": _absolute(args.keys),
        "job_key_file": _absolute(engine_key),
        "processes": args.processes,
        "tls_cert": _absolute(args.tls_cert),
        "tls_key": _absolute(args.tls_key),
        "unix_socket": _absolute(args.unix_socket),
        "kv_events": _by_worker(args.kv_events, {worker["url"]: worker["name"] for worker in workers}),
        "workers": workers,
    }
    if args.policy is not None:
        found["policy"] = args.policy
    return found


def _by_worker(
    given: list[tuple[str, str, str | None]], names: dict[str, str]
) -> dict[str, list[tuple[str, str | None]]]:
    found: dict[str, list[tuple[str, str | None]]] = {}
    for url, events, replay in given:
        if url not in names:
            raise UsageError(
                f"--kv-events names {url}, which is no worker", hint=f"workers: {', '.join(names)}"
            )
        found.setdefault(names[url], []).append((events, replay))
    return found


def _served_name(urls: list[str], key_file: Path | None) -> str:
    """The model an engine says it serves: the first one that answers."""
    import json
    import urllib.request

    key = key_file.read_text(encoding="ascii").strip() if key_file is not None else None
    for url in urls:
        request = urllib.request.Request(f"{url}/v1/models")
        if key is not None:
            request.add_header("authorization", f"Bearer {key}")
        try:
            # An engine on a cluster is never behind the proxy that HTTP_PROXY names.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request, timeout=5.0) as answer:
                return str(json.load(answer)["data"][0]["id"])
        except (OSError, ValueError, LookupError, TypeError):
            continue
    raise ConfigError(
        f"none of {', '.join(urls)} says which model it serves",
        hint="--served-name NAME gives the name; engines may then come up later",
    )


def _url(text: str) -> str:
    split = urlsplit(text if "://" in text else f"http://{text}")
    try:
        good = split.scheme == "http" and split.hostname and split.port and split.path in ("", "/")
    except ValueError:
        good = False
    if not good or split.query or split.username:
        raise argparse.ArgumentTypeError(f"{text!r} is not an http://HOST:PORT")
    return f"http://{split.netloc}"


def _kv_events(text: str) -> tuple[str, str, str | None]:
    url, _, endpoints = text.rpartition("=")
    events, _, replay = endpoints.partition(",")
    if (
        not url
        or not all(end.startswith(("ipc://", "tcp://")) for end in (events, replay) if end)
        or not events
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not URL=EVENTS or URL=EVENTS,REPLAY (ipc:// or tcp://)"
        )
    return _url(url), events, replay or None


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
    return int(text)


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())
