"""How long a test waits for something before it says that it never comes."""

from __future__ import annotations

# Seconds. A test that passes goes on at once, so patience costs nothing: what this bounds is a hang.
# How fast things are is told by the benchmarks, as ratios in one run, and not by tests.
DEADLINE = 120.0
