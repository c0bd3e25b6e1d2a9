"""Threads of the staging program: daemons, because a file system that hangs never lets go of one.

Those of asyncio.to_thread and of a ThreadPoolExecutor are joined at the loop's end, and at the interpreter's.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from .trouble import NotStaged

T = TypeVar("T")


def start(work: Callable[..., object], *arguments: Any) -> threading.Thread:
    """Raises NotStaged when the node gives no further thread."""
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise NotStaged(
            f"this node gives no further thread: {error}",
            hint="look at `ulimit -u` there, and at the job's limit of tasks (pids.max of its cgroup)",
        ) from error
    return thread


async def in_thread(work: Callable[..., T], *arguments: Any) -> T:
    """What `work` returns or raises; NotStaged as from `start`. When cancelled it leaves the thread alone."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: Exception | None) -> None:
        if result.done():  # cancelled
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        value: T | None = None
        failed: Exception | None = None
        try:
            value = work(*arguments)
        except Exception as error:
            failed = error
        with suppress(RuntimeError):  # the loop is closed: nobody waited for it
            loop.call_soon_threadsafe(settle, value, failed)

    start(run)
    return await result
