"""Which tests may run beside each other, when pytest has several processes (`make test`)."""

from __future__ import annotations

import pytest

_HEAVY = ("cluster", "engine")


# After the folders' own conftest files, which set some of these marks.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One test cluster per machine, and one real engine at a time: their tests share one process.

    They wait more than they compute, so all other tests run beside them in a second one.
    """
    for item in items:
        if any(item.get_closest_marker(mark) for mark in _HEAVY):
            item.add_marker(pytest.mark.xdist_group("machine"))
