"""staged.json: where this run's engines load the model from. Rank 0 writes it, agents and head read it."""

from __future__ import annotations

import asyncio
import os
import time

import msgspec

from ...errors import JobError, StorageError
from ...rundir.atomic import read_json
from ...rundir.layout import RunDir
from ..inputs import Inputs

STAGED_WAIT = 90.0
"""Seconds for staged.json to be visible on a node; NFS clients may be a minute late."""


class Staged(msgspec.Struct, frozen=True, kw_only=True):
    attempt: str
    path: str | None
    """Of the copy, the same on every node; None: the engines load from `model` itself."""
    seconds: float
    """What staging took of `ready_timeout`."""


def read_staged(run: RunDir, attempt: str) -> Staged | None:
    """What this attempt's staging came to; None while it is not over. Raises StorageError for a bad file."""
    try:
        staged = msgspec.convert(read_json(run.staged), Staged)
    except FileNotFoundError:
        return None
    except msgspec.ValidationError as error:
        raise StorageError(
            f"{run.staged} is not what staging writes: {error}", hint="start the run again"
        ) from error
    return staged if staged.attempt == attempt else None


async def staging_seconds(inputs: Inputs) -> float:
    """What staging took of ready_timeout; 0 for a model that is not staged."""
    if not inputs.plan.model.stage:
        return 0.0
    return (await wait_for_staged(inputs.run, inputs.attempt)).seconds


async def wait_for_staged(run: RunDir, attempt: str, seconds: float = STAGED_WAIT) -> Staged:
    """After the staging step. Raises JobError when its result does not show up."""
    deadline = time.monotonic() + seconds
    while (staged := read_staged(run, attempt)) is None:
        if time.monotonic() > deadline:
            raise JobError(
                f"{run.staged} did not appear within {seconds:g} s",
                hint="does this node see the same run directory as the head node?",
            )
        # Listing makes an NFS client notice new files.
        os.listdir(run.path)
        await asyncio.sleep(0.1)
    return staged
