"""Where the test cluster keeps its things. One test cluster per machine."""

from __future__ import annotations

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]

RUN = Path("/run/hpcserve-testbed")
"""Configuration, sockets, logs and state of the running cluster; gone after `down`."""

SHARED = Path("/var/lib/hpcserve-testbed")
"""The shared file system: home directories and models, kept between clusters."""

MOUNTED = Path("/opt/hpcserve-testbed/checkout")
"""The checkout as the cluster's users see it: read-only, and readable wherever the clone lies."""

PYTHON = MOUNTED / ".venv/bin/python"
SLURM_CONF = RUN / "slurm.conf"
PLUGINS = RUN / "plugstack.d"
LOGS = RUN / "log"
PIDS = RUN / "pids"
GPUS = RUN / "gpus"
MUNGE_SOCKET = RUN / "munge" / "munge.socket"
LOCK = Path("/run/hpcserve-testbed.lock")
MODELS = SHARED / "models"
APPTAINER = Path("/opt/hpcserve-testbed/apptainer/usr/bin/apptainer")
"""Where install_apptainer.sh puts it."""
