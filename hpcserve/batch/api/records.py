"""Files and batches: as they are written down, and as OpenAI's clients read them.

The objects' members are those of `openai/types/file_object.py` and `openai/types/batch.py` (openai-python
2.x). Times are Unix seconds.
"""

from __future__ import annotations

import os
import time
from typing import Any, Literal

import msgspec

Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
OVER: frozenset[Status] = frozenset({"failed", "completed", "expired", "cancelled"})


class FileRecord(msgspec.Struct, kw_only=True):
    """A file that was uploaded, or that a batch made."""

    id: str
    number: int
    """Files and batches in the order they were made."""
    owner: str
    """Name of the key; "" for the run's own."""
    created_at: int
    filename: str
    bytes: int
    purpose: Literal["batch", "batch_output"]
    path: str
    """Of its content, below the API's directory."""

    def shown(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": None,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class LineError(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with a batch, or with a line of its input."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None
    """From 1."""


class Counts(msgspec.Struct, kw_only=True):
    """Requests of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchRecord(msgspec.Struct, kw_only=True):
    """One batch."""

    id: str
    number: int
    owner: str
    key: str
    """Id of the key that made it, in whose name its requests are sent; "" for the run's own."""
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    status: Status = "validating"
    metadata: dict[str, str] | None = None
    model: str | None = None
    counts: Counts = msgspec.field(default_factory=Counts)
    """As of the last change of status."""
    errors: list[LineError] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    expires_at: int | None = None
    """When the run's walltime ends. The window of 24 hours is accepted, and ends nothing by itself."""
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    @property
    def over(self) -> bool:
        return self.status in OVER

    def enter(self, status: Status) -> None:
        """The status is this from now on."""
        self.status = status
        setattr(self, f"{status}_at", int(time.time()))

    def shown(self, counts: Counts) -> dict[str, Any]:
        """`counts`: of this moment."""
        told = {name: getattr(self, name) for name in _SHOWN}
        errors = None
        if self.errors is not None:
            errors = {"object": "list", "data": [msgspec.to_builtins(error) for error in self.errors]}
        return {
            **told,
            "object": "batch",
            "errors": errors,
            "request_counts": msgspec.to_builtins(counts),
            "usage": None,
        }


_SHOWN = (
    "id", "endpoint", "model", "input_file_id", "completion_window", "status", "output_file_id",
    "error_file_id", "created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at",
    "failed_at", "expired_at", "cancelling_at", "cancelled_at", "metadata",
)  # fmt: skip


def new_id(prefix: Literal["file-", "batch_"]) -> str:
    """One that nobody guesses."""
    return prefix + os.urandom(16).hex()
