"""Fixtures of the batch's tests."""

from __future__ import annotations

from tests.router.conftest import start

__all__ = ["start"]
