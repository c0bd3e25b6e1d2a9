"""Images for the container tests, made of this machine's own files: a root file system, a .sqsh, a .sif.

They hold a Python, a shell, Open MPI and PMIx. hpcserve itself comes in by a bind of the checkout.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from . import paths

DIRECTORY = paths.SHARED / "images"
_PROGRAMS = ("sh", "bash", "env", "cat", "ls", "id", "sleep", "python3")
_TREES = (
    "/usr/lib/python3.11",
    "/usr/lib/x86_64-linux-gnu/openmpi",
    "/usr/lib/x86_64-linux-gnu/pmix2",
    "/usr/share/openmpi",
    "/usr/share/pmix",
    "/etc/openmpi",
)
_LIBRARIES = (
    *("libmpi.so.40", "libpmix.so.2", "libstdc++.so.6", "libgcc_s.so.1", "libz.so.1"),
    *("libpthread.so.0", "libdl.so.2", "librt.so.1", "libutil.so.1", "libm.so.6", "libresolv.so.2"),
)
_LIBRARY_PATH = Path("/usr/lib/x86_64-linux-gnu")
_EMPTY = ("tmp", "proc", "sys", "dev", "run", "var/tmp", "var/lock", "root", "opt", "var/lib")
_UNCOMPRESSED = ("-noI", "-noD", "-noF", "-noX")
ENVIRONMENT = "PATH=/usr/local/bin:/usr/bin:/bin\nIMAGE_SAYS=image\nBOTH_SAY=image\n"
"""What the .sqsh sets, in enroot's place for it: /etc/environment."""


def squash() -> Path:
    """A squashfs file as `enroot import` leaves one."""
    image = DIRECTORY / "test.sqsh"
    _make(image, ["mksquashfs", str(_rootfs()), "OUT", "-no-progress", "-quiet", *_UNCOMPRESSED])
    return image


def sif(apptainer: str) -> Path:
    """The same root file system as Apptainer's own image format."""
    image = DIRECTORY / "test.sif"
    _make(
        image,
        [
            apptainer,
            "--quiet",
            "build",
            f"--mksquashfs-args={' '.join(_UNCOMPRESSED)}",
            "OUT",
            str(_rootfs()),
        ],
    )
    return image


def _make(image: Path, argv: list[str]) -> None:
    part = image.with_name(f"part-{image.name}")
    part.unlink(missing_ok=True)
    done = subprocess.run(
        [str(part) if word == "OUT" else word for word in argv],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": "/root"},
    )
    if done.returncode:
        raise RuntimeError(f"{argv[0]} made no image: {done.stdout}{done.stderr}")
    part.chmod(0o644)
    part.replace(image)


@cache
def _rootfs() -> Path:
    root = DIRECTORY / "rootfs"
    if root.is_dir():
        shutil.rmtree(root)
    root.mkdir(parents=True)
    for name in ("usr/bin", "usr/lib/x86_64-linux-gnu", "usr/lib64", "etc", *_EMPTY):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    programs = [Path("/usr/bin") / name for name in _PROGRAMS]
    libraries = [_LIBRARY_PATH / name for name in _LIBRARIES]
    for tree in map(Path, _TREES):
        if tree.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "test", "idlelib", "config-3.11-*")
            shutil.copytree(
                tree, root / tree.relative_to("/"), symlinks=True, ignore=ignore, dirs_exist_ok=True
            )
    plugins = [path for tree in _TREES for path in Path(tree).rglob("*.so*") if path.is_file()]
    _copy(root, programs)
    _copy(root, [path for path in libraries if path.exists()])
    _copy(root, _needed([*programs, *libraries, *plugins]))
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "etc/environment").write_text(ENVIRONMENT)
    for name in ("hosts", "hostname", "resolv.conf", "localtime"):
        (root / "etc" / name).touch()
    return root


def _copy(root: Path, files: Iterable[Path]) -> None:
    """Each under its own name, and with all that this name is a link to."""
    for path in files:
        target = root / "usr" / path.resolve().relative_to("/usr")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copy2(path.resolve(), target)
        name = root / "usr" / (path.parent.resolve() / path.name).relative_to("/usr")
        name.parent.mkdir(parents=True, exist_ok=True)
        if not name.exists() and not name.is_symlink():
            name.symlink_to(os.path.relpath(target, name.parent))


def _needed(files: Iterable[Path]) -> list[Path]:
    """Libraries that the loader takes for these files, and the loader."""
    existing = [str(path) for path in files if path.exists()]
    text = subprocess.run(["ldd", *existing], capture_output=True, text=True).stdout
    return sorted({Path(found) for found in re.findall(r"(/\S+\.so\S*) \(0x", text)})
