"""Which tests may run beside each other, when pytest has several processes (`make test`)."""

from __future__ import annotations

import pytest

_ONE_AT_A_TIME = ("cluster", "engine")


# Runs after the same hook of the folders' own conftest files, which set some of these marks, and before
# xdist's, which reads the groups.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A machine has one test cluster, and room for one group of real engines beside it.

    So the cluster's tests share one process; so do those of real engines elsewhere. Both wait more than
    they compute, and all other tests run where there is room.
    """
    for item in items:
        group = next((mark for mark in _ONE_AT_A_TIME if item.get_closest_marker(mark)), None)
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))
