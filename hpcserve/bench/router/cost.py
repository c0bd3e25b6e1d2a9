"""What a process tree costs: CPU time and resident memory, from /proc."""

from __future__ import annotations

from pathlib import Path

_KIB = 1024


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        for task in _tasks(parent):
            try:
                found += [int(child) for child in (task / "children").read_text().split()]
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of the whole tree so far, in user and kernel.

    From each thread's schedstat, in nanoseconds: /proc/PID/stat counts in ticks of 10 ms.
    """
    total = 0
    for process in tree(pid):
        for task in _tasks(process):
            try:
                total += int((task / "schedstat").read_text().split()[0])
            except (FileNotFoundError, ProcessLookupError):
                continue
    return total / 1e9


def resident(pid: int) -> list[int]:
    """Resident bytes of each process of the tree, largest first."""
    sizes = []
    for process in tree(pid):
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        sizes += [int(line.split()[1]) * _KIB for line in lines if line.startswith("VmRSS:")]
    return sorted(sizes, reverse=True)


def _tasks(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return []
