"""The process of the Batch API: `python -m hpcserve.batch api DIR --endpoint RUN/endpoint.json …`."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...http.server import serve
from ...rundir.atomic import write_json
from .carrier import AT_ONCE, Carrier
from .handler import MAX_FILE, Handler
from .layout import ApiDir
from .store import Store

log = logging.getLogger(__name__)
_GRACE = 2.0
"""Seconds for answers that are being written at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    directory: Path
    """The run's `batches`."""
    endpoint: Path
    """The run's endpoint.json; it may come later."""
    model: str
    """Hub id or directory."""
    revision: str | None = None
    at_once: int = AT_ONCE
    max_file: int = MAX_FILE
    """Bytes."""
    with_parent: bool = False
    """End when standard input does: whoever started this holds its other end."""


def run(settings: Settings) -> int:
    """Serve until SIGTERM. Raises StorageError."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    asyncio.run(_serve(settings))
    return 0


async def _serve(settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if settings.with_parent:
        loop.add_reader(sys.stdin.fileno(), _at_end, stop.set)
    directory = ApiDir(settings.directory.absolute())
    store = Store(directory)
    carrier = Carrier(
        store, settings.endpoint, model=settings.model, revision=settings.revision, at_once=settings.at_once
    )
    token = secrets.token_urlsafe(32)
    handler = Handler(store, carrier, token=token, endpoint=settings.endpoint, max_file=settings.max_file)
    server = await serve(handler.handle)
    # The port and the token are new ones each time, and the router looks here at each request. So whichever
    # of the two is started again, they find each other, and a stranger on an old port learns nothing.
    write_json(directory.address, {"url": f"http://127.0.0.1:{server.port}", "token": token}, mode=0o600)
    carrier.start()
    log.info("listening on port %d; %d batches to go on with", server.port, len(store.unfinished()))
    await stop.wait()
    directory.address.unlink(missing_ok=True)
    await server.close(_GRACE)
    await carrier.close()
    log.info("ended")
    # A plan that is being made in a thread would keep the process: it appears whole or not at all.
    logging.shutdown()
    os._exit(0)


def _at_end(stop: Callable[[], None]) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        stop()
