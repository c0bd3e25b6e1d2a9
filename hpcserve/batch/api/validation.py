"""What is wrong with a batch's input, line by line, as OpenAI tells it."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import ConfigError
from ..inputs.files import open_inputs
from .records import LineError

_MOST = 10
_CODES = (
    ("broken JSON", "invalid_json_line"),
    ("must be a JSON object", "invalid_json_line"),
    ("invalid UTF-8", "invalid_json_line"),
    ("the file is empty", "empty_file"),
    ("method must be", "invalid_method"),
    ("url must be", "invalid_url"),
    ("the batch's endpoint", "mismatched_endpoint"),
)
_ID = re.compile(r"custom_id '.*' is that of ")


def check(path: Path, endpoint: str) -> None:
    """Are these lines requests to `endpoint`? What planning looks at as well is left to it. Raises
    ConfigError."""
    inputs = open_inputs([str(path)])
    if inputs.kind != "openai":
        raise ConfigError(
            f"{path}:1: the line is no request of a batch: it needs custom_id, method, url and body",
            hint="Plain rows are for `hpcserve batch`, which makes requests of them.",
        )
    wrong = []
    for row in inputs.rows():
        url = row.columns.get("url")
        if isinstance(url, str) and url != endpoint:
            wrong.append(f"  {row.place}: url is {url[:100]}, and the batch's endpoint is {endpoint}")
            if len(wrong) == _MOST:
                break
    if wrong:
        raise ConfigError("\n".join(("lines for other endpoints:", *wrong)), hint="Make a batch for each.")


def errors(error: ConfigError, path: Path) -> list[LineError]:
    """What `error` says of the input in `path`, one entry for each line it names."""
    place = re.compile(rf"\s*{re.escape(str(path))}:(?:(\d+):)?\s*(.*)")
    found = []
    for text in error.message.splitlines():
        named = place.fullmatch(text)
        if named is not None:
            line = None if named[1] is None else int(named[1])
            found.append(LineError(code=_code(named[2]), message=_private(named[2], path), line=line))
    return found or [LineError(code="invalid_request", message=_private(error.message, path))]


def _code(message: str) -> str:
    if _ID.match(message):
        return "duplicate_custom_id"
    return next((code for words, code in _CODES if words in message), "invalid_request")


def _private(message: str, path: Path) -> str:
    """Without the path, which is nobody's business."""
    return message.replace(f"{path}:", "line ").replace(str(path), "the file")
