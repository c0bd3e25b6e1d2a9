"""Ask a run's endpoint: one question on the command line, or a conversation."""

from __future__ import annotations

import argparse
import http.client
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import RunError
from .arguments import Parser, add_run
from .named import named_run
from .output import say

_AGAIN = "ask again; `hpcserve status` shows whether an engine was lost"
_SILENCE = 600.0
"""Seconds without a byte after which the endpoint counts as dead."""


def add_arguments(parser: Parser) -> None:
    add_run(parser)
    parser.add_argument("question", nargs="?", help="ask this, print the answer, end")


def run(args: argparse.Namespace) -> int:
    from ..control import endpoint

    where = endpoint(named_run(args.run))
    messages: list[dict[str, str]] = []
    if args.question is not None:
        _turn(where, messages, args.question)
        return 0
    if sys.stdin.isatty():
        say(f"talking to {where['served_name']}; end with Ctrl-D")
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if question.strip():
            _turn(where, messages, question)


def _turn(where: Mapping[str, Any], messages: list[dict[str, str]], question: str) -> None:
    """Print the answer as it comes, and remember both sides."""
    messages.append({"role": "user", "content": question})
    answer = ""
    for piece in stream(where, messages):
        answer += piece
        print(piece, end="", flush=True)
    print()
    messages.append({"role": "assistant", "content": answer})


def stream(where: Mapping[str, Any], messages: list[dict[str, str]]) -> Iterator[str]:
    """Pieces of the answer of one chat completion. Raises RunError."""
    from ..rundir.runs import read_key

    headers = {"Content-Type": "application/json"}
    if where.get("key_file"):
        headers["Authorization"] = f"Bearer {read_key(Path(where['key_file']))}"
    url = urlsplit(f"{where['url']}/chat/completions")
    body = {"model": where["served_name"], "messages": messages, "stream": True}
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=_SILENCE)
    try:
        connection.request("POST", url.path, json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RunError(f"the endpoint answered {response.status}: {_message(response.read())}")
        yield from _deltas(response)
    except (OSError, http.client.HTTPException) as error:
        raise RunError(
            f"the endpoint {where['url']} does not answer: {error}",
            hint="is this a host of the same cluster? `hpcserve connect` prints a tunnel for others",
        ) from error
    finally:
        connection.close()


def _deltas(lines: Iterator[bytes] | http.client.HTTPResponse) -> Iterator[str]:
    for line in lines:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        try:
            event = json.loads(data)
            if "error" in event:
                raise RunError(f"the answer broke off: {_message(data)}", hint=_AGAIN)
            pieces = [choice["delta"].get("content") or "" for choice in event["choices"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"the endpoint sent something else than a piece of an answer: {data[:200]!r}",
                hint="is it hpcserve's own? `hpcserve logs --role router` says more",
            ) from error
        yield from pieces
    raise RunError("the answer broke off: the connection was closed before its end", hint=_AGAIN)


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:300].decode(errors="replace")
