"""Small facts about child processes on Linux."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
# Loaded before any fork: dlopen in a forked child may deadlock.
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int) -> None:
    """In a fresh child: ask the kernel for SIGKILL when `parent` is gone, so that nothing outlives it."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        # It died between fork and prctl.
        os._exit(1)


def signal_group(group: int, number: signal.Signals) -> bool:
    """Send a signal to a process group we started; False when nobody is left in it."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
