"""OpenAI's batch lines: `output.jsonl` has the answers, `errors.jsonl` the rest.

A line is {"id", "custom_id", "response": {"status_code", "request_id", "body"} or null, "error": {"code",
"message"} or null} (https://platform.openai.com/docs/api-reference/batch/request-output). `id` is made of the
item's number, so that the same answers give the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from .answers import Answer, failure, is_json
from .file import LinesWriter
from .text import whole_characters

ID_PREFIX = "batch_req_"


class Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw
    """JSON as the engine sent it; a string where it sent something else."""


class Error(msgspec.Struct):
    code: str
    message: str


class Line(msgspec.Struct):
    id: str
    custom_id: str
    response: Response | None = None
    error: Error | None = None


_encode = msgspec.json.Encoder().encode


class OpenAIWriter(LinesWriter):
    """Each answer is in one of the two files. `samples` is how many each row has."""

    def __init__(self, output: Path, errors: Path, *, samples: int = 1) -> None:
        super().__init__(output, errors)
        self._samples = samples

    def write(self, answer: Answer) -> None:
        failed = failure(answer)
        line = Line(
            id=f"{ID_PREFIX}{answer.item}",
            custom_id=whole_characters(self._custom_id(answer)),
            response=_response(answer) if answer.status else None,
            error=Error(*map(whole_characters, failed)) if failed is not None else None,
        )
        self._files[failed is not None].write_line(_encode(line))

    def _custom_id(self, answer: Answer) -> str:
        """Its own, else its row's number from 0."""
        if answer.custom_id is not None:
            return answer.custom_id
        row = f"row-{answer.row}"
        return row if self._samples == 1 else f"{row}-sample-{answer.sample}"


def _response(answer: Answer) -> Response:
    body = answer.body
    if not is_json(body):
        body = _encode(body.decode("utf-8", "replace"))
    elif b"\n" in body or b"\r" in body:
        # In JSON these are only between values.
        body = body.replace(b"\n", b" ").replace(b"\r", b" ")
    return Response(answer.status, answer.request_id, msgspec.Raw(body))
