"""How a program is put into a container on a node: flags of pyxis and Apptainer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ..config.images import image_path
from ..errors import ConfigError
from ..plan.limits import switched_on
from ..plan.offload import shared_bytes
from ..plan.plan import Plan
from .quoting import Expanding

PACKAGE_IN_IMAGE = "/opt/hpcserve-package"
"""Where an image without hpcserve finds the modules that engines load from it."""
FOREIGN = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "VIRTUAL_ENV")
"""Variables that name the node's own libraries, which are not the image's."""
NO_USER_SITE = "PYTHONNOUSERSITE"
"""Keeps ~/.local/lib/python3… out, which belongs to another Python when the home directory is mounted."""
LIBRARIES = "LD_LIBRARY_PATH"
_HOME = re.compile(r"(^|:)~/")
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
    # Where enroot.conf says ENROOT_REMAP_ROOT, every user would be 0 inside, and use the same names in /tmp.
    if "--container-remap-root" not in container.args:
        flags.append("--no-container-remap-root")
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


def image_libraries(value: str) -> dict[str, str]:
    """Variables that set LD_LIBRARY_PATH inside: Apptainer and SingularityCE leave the outer one outside."""
    return {f"{prefix}ENV_{LIBRARIES}": value for prefix in ("APPTAINER", "SINGULARITY")}


def hides_devices(plan: Plan) -> bool:
    """Does a flag give programs a small /dev, and does no bind bring InfiniBand back?"""
    container = plan.site.container
    flags = {flag for word in container.args for flag in switched_on(word)}
    return (
        container.runtime == "apptainer"
        and not flags.isdisjoint({"-c", "--contain"})
        and _shown_by(list(container.binds), "/dev/infiniband") is None
    )


def binds(plan: Plan, run_dir: Path) -> list[str]:
    """`SOURCE:TARGET[:ro]` of everything a process needs to see; what one shows is not bound again.

    Raises ConfigError when the site binds read-only what must be written.
    """
    chosen = [_HOME.sub(r"\1$HOME/", bind) for bind in plan.site.container.binds]
    local = plan.site.storage.node_local.rstrip("/")
    shown = _shown_by(chosen, local)
    if shown is None or _read_only(chosen[shown], local):
        # Before the site's, because it may bind something below it, but over what it is shown by.
        chosen.insert(0 if shown is None else shown + 1, f"{local}:{local}")
    for path, flags, written in _own_paths(plan, run_dir):
        shown = _shown_by(chosen, path)
        if shown is None or (written and _read_only(chosen[shown], path)):
            chosen.append(f"{path}:{path}{flags}")
    return chosen


def _own_paths(plan: Plan, run_dir: Path) -> Iterator[tuple[str, str, bool]]:
    """Path, flags, and whether it must be possible to write there."""
    # With the keys and the usage of all runs, which are beside it.
    yield str(run_dir.parent), "", True
    if plan.model.model.startswith("/"):
        path = plan.model.model.rstrip("/")
        # In a cache of the Hugging Face hub the files of a snapshot are links to a directory beside it.
        snapshot = _HUB_SNAPSHOT.fullmatch(path)
        yield snapshot[1] if snapshot else path, ":ro", False
    for name in _HUB_VARIABLES:
        if name in plan.site.setup.env:
            # A site may share one that is filled already.
            yield plan.site.setup.env[name].rstrip("/"), "", False
    if plan.batch is not None:
        yield plan.batch.output, "", True
    if shared_bytes(plan) and plan.site.storage.kv is not None:
        yield plan.site.storage.kv.rstrip("/"), "", True


def _shown_by(binds: list[str], path: str) -> int | None:
    """Index of the bind that shows `path` under its own name: the innermost, and of equal ones the last."""
    found = None
    for index, bind in enumerate(binds):
        source, target, _ = _parts(bind)
        inside = path == source or path.startswith(f"{source}/")
        if inside and target == source and (found is None or len(source) >= len(_parts(binds[found])[0])):
            found = index
    return found


def _read_only(bind: str, path: str) -> bool:
    """Of one that shows `path`, where something is written. Raises ConfigError: it can't be bound again."""
    source, _, flags = _parts(bind)
    if "ro" not in flags:
        return False
    if source == path:
        raise ConfigError(
            f"container.binds of the site has {bind}, and hpcserve writes to that directory",
            hint="leave `:ro` out there",
        )
    return True


def _parts(bind: str) -> tuple[str, str, list[str]]:
    """Source and target without a last slash (`/` is empty), and flags, of Apptainer or pyxis."""
    source, _, rest = bind.partition(":")
    target, _, flags = rest.partition(":")
    return source.rstrip("/"), (target or source).rstrip("/"), re.split("[,+]", flags)


def _pyxis_mount(bind: str) -> str:
    """pyxis wants both names."""
    return bind if ":" in bind else f"{bind}:{bind}"
