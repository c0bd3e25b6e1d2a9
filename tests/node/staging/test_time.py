"""Staging and loading share one time."""

from __future__ import annotations

import asyncio

import pytest

from hpcserve.errors import EngineError
from hpcserve.node.head.readiness import Readiness
from tests.node.runs import make_plan, replica
from tests.node.test_registry import registry


async def test_what_staging_took_is_not_waited_for_again() -> None:
    only = replica("aggregated-0", 0)
    readiness = Readiness(make_plan(1, only, ready_timeout=60), registry(1, only), asyncio.Event)
    with pytest.raises(EngineError, match=r"not ready after 60 s, 60 s of which went into staging the model"):
        await readiness.engines(60.0)
