"""How a program is put into a container on a node: flags of pyxis and Apptainer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ..config.images import image_path
from ..plan.offload import shared_bytes
from ..plan.plan import Plan
from .quoting import Expanding

PACKAGE_IN_IMAGE = "/opt/hpcserve-package"
"""Where an image without hpcserve finds the modules that engines load from it."""
FOREIGN = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "VIRTUAL_ENV")
"""Variables that name the node's own libraries, which are not the image's."""
NO_USER_SITE = "PYTHONNOUSERSITE"
"""Keeps ~/.local/lib/python3… out, which belongs to another Python when the home directory is mounted."""
_HUB_SNAPSHOT = re.compile(r"(/.+/(?:models|datasets)--[^/]+)/snapshots/[^/]+")
_HUB_VARIABLES = ("HF_HOME", "HF_HUB_CACHE")


def pyxis_words(plan: Plan, run_dir: Path) -> list[str]:
    """Flags of srun (github.com/NVIDIA/pyxis)."""
    container = plan.site.container
    mounts = ",".join(_pyxis_mount(bind) for bind in binds(plan, run_dir))
    flags = [
        Expanding(f"--container-image={image_path(container)}"),
        Expanding(f"--container-mounts={mounts}"),
        "--no-container-mount-home",
    ]
    # Where the image sets a variable too, the job's value wins.
    ours = sorted({"HPCSERVE_RUN_DIR", *plan.site.setup.env})
    flags.append(f"--container-env={','.join(ours)}")
    return [*flags, *container.args]


def apptainer_words(plan: Plan, run_dir: Path) -> list[str]:
    """What stands between `apptainer exec`, or `singularity exec`, and the program."""
    container = plan.site.container
    gpu = ["--nv"] if plan.device == "cuda" else []
    mounts = [Expanding(f"--bind={bind}") for bind in binds(plan, run_dir)]
    image = Expanding(image_path(container))
    return [*gpu, *mounts, *container.args, image]


def binds(plan: Plan, run_dir: Path) -> list[str]:
    """`SOURCE:TARGET[:ro]` of everything a process needs to see; what one shows is not bound again."""
    chosen = list(plan.site.container.binds)
    local = plan.site.storage.node_local.rstrip("/")
    if not any(_covers(bind, local) for bind in chosen):
        # First, because a site may bind something below it.
        chosen.insert(0, f"{local}:{local}")
    for path, flags in _own_paths(plan, run_dir):
        if not any(_covers(bind, path) for bind in chosen):
            chosen.append(f"{path}:{path}{flags}")
    return chosen


def _own_paths(plan: Plan, run_dir: Path) -> Iterator[tuple[str, str]]:
    # With the keys and the usage of all runs, which are beside it.
    yield str(run_dir.parent), ""
    if plan.model.model.startswith("/"):
        path = plan.model.model.rstrip("/")
        # In a cache of the Hugging Face hub the files of a snapshot are links to a directory beside it.
        snapshot = _HUB_SNAPSHOT.fullmatch(path)
        yield snapshot[1] if snapshot else path, ":ro"
    for name in _HUB_VARIABLES:
        if name in plan.site.setup.env:
            yield plan.site.setup.env[name].rstrip("/"), ""
    if plan.batch is not None:
        yield plan.batch.output, ""
    if shared_bytes(plan) and plan.site.storage.kv is not None:
        yield plan.site.storage.kv.rstrip("/"), ""


def _covers(bind: str, path: str) -> bool:
    """Whether `bind` already shows `path` under its own name."""
    source, _, rest = bind.partition(":")
    target = rest.partition(":")[0] or source
    source = source.rstrip("/") or "/"
    inside = path == source or path.startswith(source.rstrip("/") + "/")
    return inside and target.rstrip("/") == source.rstrip("/")


def _pyxis_mount(bind: str) -> str:
    """pyxis wants both names."""
    return bind if ":" in bind else f"{bind}:{bind}"
