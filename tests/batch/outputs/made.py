"""Answers as engines give them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hpcserve.batch.outputs.answers import Answer

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}


def chat(text: str | None = "hello", **message: Any) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text} | message,
        "finish_reason": "stop",
    }
    return {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice], "usage": USAGE}


def embedding(*vectors: Any) -> dict[str, Any]:
    data = [{"index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    return {"object": "list", "data": data, "usage": {"prompt_tokens": 2, "total_tokens": 2}}


def answered(row: int = 0, body: Any = None, **more: Any) -> Answer:
    given = chat() if body is None else body
    fields = {"item": row, "row": row, "sample": 0, "status": 200, "request_id": f"req-{row}"}
    fields["body"] = given if isinstance(given, bytes) else json.dumps(given).encode()
    return Answer(**(fields | more))


def failed(row: int = 0, **more: Any) -> Answer:
    return answered(row, b"", **({"status": 0, "error": ("engine_died", "three times")} | more))


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
