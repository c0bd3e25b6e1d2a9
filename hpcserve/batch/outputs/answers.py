"""One answer, as the writers get it."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol, Self

import msgspec

from .text import json_text

_decode = msgspec.json.Decoder().decode
_check = msgspec.json.Decoder(msgspec.Raw).decode
_BROKEN = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class Answer(msgspec.Struct, kw_only=True):
    """What became of one item: there is exactly one for each."""

    item: int
    """row * n + sample"""
    row: int
    sample: int
    custom_id: str | None = None
    """None: the input has no custom ids."""
    columns: dict[str, Any] | None = None
    """Of the input."""
    status: int
    """HTTP; 0: it was never answered."""
    body: bytes = b""
    """The engine's JSON; or its text, where a proxy answered."""
    error: tuple[str, str] | None = None
    """Code and message."""
    attempts: int = 1
    request_id: str = ""


class Writer(Protocol):
    """`with` closes it. After an error it leaves a file that is not whole: the caller has named it so."""

    def write(self, answer: Answer) -> None:
        """Raises StorageError."""

    def close(self) -> None:
        """All is on disk after this. Raises StorageError."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def failure(answer: Answer) -> tuple[str, str] | None:
    """Code and message of an answer that is none; None for a good one.

    An answer with status 200 whose body is no JSON is none, either.
    """
    if answer.error is not None:
        return answer.error
    if answer.status == 200:
        if is_json(answer.body):
            return None
        return "invalid_answer", f"the engine's answer is no JSON: {_text(answer.body[:200])!r}"
    if answer.status == 0:
        return "no_answer", "it was never answered"
    return f"http_{answer.status}", _message(answer.body) or f"HTTP {answer.status}"


def is_json(body: bytes) -> bool:
    try:
        body.decode()  # the check of JSON passes over what is in strings
        _check(body)
    except _BROKEN:
        return False
    return True


def _text(body: bytes) -> str:
    return body.decode("utf-8", "replace")


def _message(body: bytes) -> str | None:
    """Of an error's body, in OpenAI's form or that of FastAPI."""
    try:
        told = _decode(body)
    except _BROKEN:
        return _text(body[:500]).strip() or None
    if isinstance(told, dict):
        error = told.get("error")
        for place in (error, told):
            if isinstance(place, dict) and isinstance(place.get("message"), str):
                return str(place["message"])
        if isinstance(error, str):
            return error
        if "detail" in told:
            return told["detail"] if isinstance(told["detail"], str) else json_text(told["detail"])
    return _text(body[:500])
