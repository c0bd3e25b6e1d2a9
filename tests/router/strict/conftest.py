from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.http.recorder import Recorder, echo
from tests.router.live import LiveRouter, worker


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def recorder() -> AsyncIterator[Recorder]:
    recorder = await Recorder().start()
    yield recorder
    await recorder.close()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def live(tmp_path_factory, recorder) -> AsyncIterator[LiveRouter]:
    """One router for a module's tests, in front of the recorder."""
    router = await LiveRouter(tmp_path_factory.mktemp("router")).start()
    await router.table([worker("aggregated-0", recorder.url)])
    yield router
    await router.idle()
    assert router.complaints == []
    await router.stop()


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def read_alike(recorder) -> AsyncIterator[None]:
    """Each test starts with a recorder that saw nothing; at its end, all parsers read the same."""
    recorder.answer = echo
    recorder.seen.clear()
    recorder.faults.clear()
    yield
    assert recorder.faults == []
