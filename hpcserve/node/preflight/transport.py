"""What UCX says about how it moves bytes: the tables it prints with UCX_PROTO_INFO=y.

One table per kind of operation and kind of peer, as UCX 1.20 prints it:

    +--------+--------------------+------------------------------------+
    | 1.0 inter-node cfg#1                                             |
    | remote memory read by ucp_get*(multi) into host memory from host |
    +--------+--------------------+------------------------------------+
    | Range  |    Description     |               Config               |
    +--------+--------------------+------------------------------------+
    | 0..inf | software emulation | tcp/eth0                           |
    +--------+--------------------+------------------------------------+
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .records import Operation

_TITLES: dict[Operation, str] = {
    "read": "remote memory read by ucp_get",
    "write": "remote memory write by ucp_put",
}
_LANE = re.compile(r"\b[a-z][a-z0-9_]*/([\w.-]+(?::\d+)?)")
_ERROR = re.compile(r"UCX\s+(?:ERROR|FATAL)\s+(.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Transport:
    """What large transfers use."""

    text: str
    """Lanes and protocol: `tcp/eth0 (software emulation)`."""
    devices: tuple[str, ...]
    """Of the lanes: `eth0`, `mlx5_0:1`."""


def transports(output: str) -> dict[Operation, Transport]:
    """The last table of each operation towards other processes; the row for the largest transfers."""
    found: dict[Operation, Transport] = {}
    titles: list[str] = []
    rows: list[list[str]] = []
    for line in [*output.splitlines(), "| |"]:
        if "|" not in line:
            continue
        cells = [cell.strip() for cell in line[line.index("|") :].strip().strip("|").split("|")]
        if len(cells) == 3:
            rows.append(cells)
            continue
        if rows:
            _take(found, titles, rows)
            titles, rows = [], []
        titles.append(cells[0])
    return found


def _take(found: dict[Operation, Transport], titles: list[str], rows: list[list[str]]) -> None:
    about = " ".join(titles)
    if " self cfg" in about:
        return
    for operation, title in _TITLES.items():
        if title in about:
            _, description, config = rows[-1]
            devices = tuple(dict.fromkeys(_LANE.findall(config)))
            found[operation] = Transport(text=f"{config} ({description})", devices=devices)


def last_error(output: str) -> str | None:
    """The last error UCX printed, such as `connect(…) failed: No route to host`."""
    errors = _ERROR.findall(output)
    return errors[-1].strip() if errors else None
