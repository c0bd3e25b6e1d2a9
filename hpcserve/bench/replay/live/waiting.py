"""Waiting, with an end, for what was started."""

from __future__ import annotations

import http.client
import json
import subprocess
import time
from urllib.parse import urlsplit

from ....errors import RunError
from ...router.peers import MODEL

_START = 60.0
_PAUSE = 0.2


def until(url: str, process: subprocess.Popen[bytes], *, what: str) -> None:
    """Until a GET of `url` is answered with 200. Raises RunError."""
    _until(url, process, what, "GET", None)


def until_it_answers(url: str, process: subprocess.Popen[bytes], *, what: str) -> None:
    """Until a chat of one token works. Raises RunError."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "ba"}], "max_tokens": 1}
    _until(f"{url}/v1/chat/completions", process, what, "POST", json.dumps(body))


def _until(url: str, process: subprocess.Popen[bytes], what: str, method: str, body: str | None) -> None:
    parts = urlsplit(url)
    deadline = time.monotonic() + _START
    last = "nothing listens"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RunError(f"{what} ended with status {process.returncode}", hint="see the log of this run")
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port or 80, timeout=10.0)
        try:
            connection.request(method, parts.path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            if answer.status == 200:
                return
            last = f"HTTP {answer.status}"
        except (OSError, http.client.HTTPException) as error:
            last = str(error)
        finally:
            connection.close()
        time.sleep(_PAUSE)
    raise RunError(f"{what} did not come up in {_START:g} s: {last}", hint="see the log of this run")
