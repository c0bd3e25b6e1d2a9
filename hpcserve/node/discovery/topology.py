"""Where Slurm says that this node hangs: its leaf switch, or its block."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping


def leaf_of(environ: Mapping[str, str]) -> str | None:
    """The switch or block this node is in, under those above it, where Slurm knows the network.

    srun sets SLURM_TOPOLOGY_ADDR to names from the root down to the node, and _PATTERN to what each is:
    `s0.s1.n3` of `switch.switch.node`, or `b8.n3` of `block.node`.
    """
    names = environ.get("SLURM_TOPOLOGY_ADDR", "").split(".")
    kinds = environ.get("SLURM_TOPOLOGY_ADDR_PATTERN", "").split(".")
    if len(names) != len(kinds) or kinds[-1] != "node" or not {"switch", "block"} & set(kinds):
        return None
    return ".".join(names[:-1])


def block_of(listing: str) -> str | None:
    """The block in `scontrol show topology NODE`; blocks of blocks, `AggregatedBlock=…`, are passed over."""
    found = re.search(r"^BlockName=(\S+)", listing, flags=re.M)
    return found[1] if found else None


def ask_block(node: str, environ: Mapping[str, str]) -> str | None:
    """The block of a node by Slurm's controller: before 25.05 srun does not say it."""
    program = shutil.which("scontrol", path=environ.get("PATH"))
    if program is None:
        return None
    command = [program, "show", "topology", node]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        # Placement does without: the router then knows of no nodes that are near each other.
        return None
    return block_of(done.stdout)
