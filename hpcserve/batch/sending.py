"""One request and what becomes of it: an answer, an error of the row's own, or another try."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from ..errors import RunError
from ..http.client import Pool
from ..http.errors import Header, UpstreamError
from ..rundir.atomic import read_json

_ANSWER_MAX = 1 << 30
_ROW_ERRORS = frozenset({400, 404, 405, 413, 415, 422})
_DEATHS = frozenset({"worker_reset", "worker_gone", "worker_protocol"})
"""The router's words for an engine that had begun with the request and is no more."""

Fate = Literal["answer", "error", "again", "died", "wait", "too_late", "ending", "refused"]
"""`again` counts as an attempt; `wait` does not: the endpoint has no room, or is away. `died`: the engine
did,
with the row in flight. `too_late`: it could not be finished before the job ends. `ending`: the endpoint takes
no more. `refused`: it takes nothing from us at all."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one request."""

    fate: Fate
    status: int = 0
    body: bytes = b"null"
    """The engine's answer, JSON."""
    code: str = ""
    message: str = ""
    request_id: str = ""
    pause: float = 0.0
    """Seconds that the endpoint asked to wait."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str = ""


class Endpoint:
    """Where requests go: an endpoint's address and key, found again when its router moves."""

    def __init__(self, file: Path, key: str = "") -> None:
        """`file` is the run's endpoint.json; `key` the id of the key in whose name requests are sent, ""
        for the run's own. Raises RunError and StorageError."""
        self._file = file
        self._key = key
        self.url = ""
        self.served_name = ""
        self.end_time: float | None = None
        """Unix seconds at which the job ends; None: not known."""
        self.headers: list[Header] = []
        self.find()

    def find_if_there(self) -> None:
        """Read its address again, where it has one at the moment. Raises StorageError."""
        with suppress(RunError):
            self.find()

    def find(self) -> None:
        """Read its address. Raises RunError when there is none (any more), and StorageError."""
        try:
            told = read_json(self._file)
        except FileNotFoundError:
            raise RunError(
                f"{self._file} is not there: the endpoint is not READY, or has ended",
                hint="see `hpcserve ls`",
            ) from None
        self.url = str(told["url"]).removesuffix("/v1")
        self.served_name = str(told["served_name"])
        self.end_time = told.get("end_time")
        self.headers = [
            (b"content-type", b"application/json"),
            (b"x-hpcserve-priority", b"batch"),
            # A row that kills engines must not be sent to one after the other by the router.
            (b"x-hpcserve-retries", b"0"),
        ]
        if told.get("key_file"):
            try:
                key = Path(told["key_file"]).read_text(encoding="ascii").strip()
            except OSError as error:
                raise RunError(
                    f"can't read the endpoint's key in {told['key_file']}: {error.strerror}",
                    hint="the batch must run as the user who launched the endpoint",
                ) from error
            self.headers.append((b"authorization", b"Bearer " + key.encode()))
        if self._key:
            self.headers.append((b"x-hpcserve-on-behalf", self._key.encode()))


async def send(pool: Pool, endpoint: Endpoint, path: str, body: bytes) -> Outcome:
    """Send one request, and wait for the whole answer."""
    try:
        response = await pool.request("POST", endpoint.url + path, headers=endpoint.headers, body=body)
        data = await response.read(_ANSWER_MAX)
    except UpstreamError as error:
        return Outcome("wait", code="endpoint", message=f"the endpoint does not answer: {error.message}")
    headers = dict(reversed(response.headers))
    return classify(response.status, data, headers)


def classify(status: int, data: bytes, headers: dict[bytes, bytes]) -> Outcome:
    """What an answer means for its row."""
    request_id = headers.get(b"x-request-id", b"").decode("latin-1")
    if status == 200:
        return replace(_answer(data), request_id=request_id)
    code, message = _told(data)
    said = Outcome(
        "again", status, code=code or str(status), message=message or f"HTTP {status}", request_id=request_id,
        pause=_seconds(headers.get(b"retry-after")),
    )  # fmt: skip
    if status in _ROW_ERRORS:
        return replace(said, fate="error")
    if status in (401, 403):
        return replace(said, fate="refused")
    if status == 429 or code in ("no_worker", "starting"):
        return replace(said, fate="wait")
    if code in ("walltime", "draining"):
        return replace(said, fate="too_late" if code == "walltime" else "ending")
    if code in _DEATHS:
        return replace(said, fate="died")
    if code == "worker_connect":
        return replace(said, fate="wait")
    return said


def _answer(data: bytes) -> Outcome:
    try:
        told: Any = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        return Outcome("again", 200, code="not_json", message=f"the answer is no JSON: {error}")
    usage = told.get("usage") if isinstance(told, dict) else None
    usage = usage if isinstance(usage, dict) else {}
    choices = told.get("choices") if isinstance(told, dict) else None
    reasons = [str(one.get("finish_reason")) for one in choices or () if isinstance(one, dict)]
    return Outcome(
        "answer", 200, body=data,
        prompt_tokens=int(usage.get("prompt_tokens") or usage.get("input_tokens") or 0),
        output_tokens=int(usage.get("completion_tokens") or usage.get("output_tokens") or 0),
        finish_reason=reasons[0] if len(reasons) == 1 else "+".join(sorted(set(reasons))),
    )  # fmt: skip


def raw(body: bytes) -> msgspec.Raw:
    return msgspec.Raw(body or b"null")


def _told(data: bytes) -> tuple[str, str]:
    """Code and message of an OpenAI-shaped error."""
    try:
        error = json.loads(data)["error"]
        return str(error.get("code") or ""), str(error.get("message") or "")
    except (ValueError, TypeError, KeyError, AttributeError):
        return "", data[:500].decode("utf-8", "replace")


def _seconds(value: bytes | None) -> float:
    return float(value) if value is not None and value.isdigit() else 0.0


async def metrics(pool: Pool, endpoint: Endpoint) -> str:
    """The text of the endpoint's /metrics. Raises UpstreamError and TimeoutError."""
    async with asyncio.timeout(5.0):
        response = await pool.request("GET", f"{endpoint.url}/metrics", headers=endpoint.headers)
        return (await response.read(1 << 26)).decode("utf-8", "replace")
