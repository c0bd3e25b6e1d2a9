"""Which tests may run beside each other, when pytest has several processes, and how patient they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A slow machine is no fault: hypothesis, too, only says what is wrong, and not how long it took.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

_CLUSTER = Path(__file__).parent / "cluster"


# Before xdist's own hook, which reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A machine has one test cluster, and room for one group of real engines beside it.

    So the cluster's tests share one process; so do those of real engines elsewhere. Both wait more than
    they compute, and all other tests run where there is room.
    """
    for item in items:
        if _CLUSTER in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("cluster"))
        elif item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.xdist_group("engine"))
