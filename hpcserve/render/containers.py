"""How a program is put into a container on a node: flags of pyxis and Apptainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..plan.plan import Plan
from .quoting import Expanding


def pyxis_words(plan: Plan, run_dir: Path) -> list[str]:
    """Flags of srun (github.com/NVIDIA/pyxis)."""
    site = plan.site
    mounts = ",".join(_pyxis_mount(bind) for bind in binds(plan, run_dir))
    flags = [
        f"--container-image={site.container.image}",
        Expanding(f"--container-mounts={mounts}"),
        "--no-container-mount-home",
    ]
    # Where the image sets a variable too, the job's value wins.
    ours = sorted({"HPCSERVE_RUN_DIR", *site.setup.env})
    flags.append(f"--container-env={','.join(ours)}")
    return [*flags, *site.container.args]


def apptainer_words(plan: Plan, run_dir: Path) -> list[str]:
    """Command before the program."""
    container = plan.site.container
    gpu = ["--nv"] if plan.device == "cuda" else []
    mounts = [Expanding(f"--bind={bind}") for bind in binds(plan, run_dir)]
    return ["apptainer", "exec", *gpu, *mounts, *container.args, str(container.image)]


def binds(plan: Plan, run_dir: Path) -> list[str]:
    """`SOURCE:TARGET[:ro]` of everything a process needs to see; what one shows is not bound again."""
    chosen = list(plan.site.container.binds)
    for path, flags in _own_paths(plan, run_dir):
        if not any(_covers(bind, path) for bind in chosen):
            chosen.append(f"{path}:{path}{flags}")
    return chosen


def _own_paths(plan: Plan, run_dir: Path) -> Iterator[tuple[str, str]]:
    yield str(run_dir), ""
    if plan.model.model.startswith("/"):
        yield plan.model.model.rstrip("/"), ":ro"
    # A staged model must lie on the node's own /tmp, not on one of the container.
    if plan.model.stage or plan.site.storage.node_local not in ("/tmp", "/tmp/"):
        yield plan.site.storage.node_local.rstrip("/"), ""


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
