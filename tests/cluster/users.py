"""Unprivileged users of the test cluster, and the checkout made readable for them."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path

from . import paths

USERS = ("hsuser", "hsother")
_EDITABLE = "_editable_impl_hpcserve.pth"


def create_users() -> None:
    for user in USERS:
        home = paths.SHARED / "home" / user
        try:
            pwd.getpwnam(user)
        except KeyError:
            options = ["--home-dir", str(home), "--no-create-home", "--shell", "/bin/bash"]
            subprocess.run(["useradd", *options, user], check=True)
        entry = pwd.getpwnam(user)
        home.mkdir(parents=True, exist_ok=True)
        os.chown(home, entry.pw_uid, entry.pw_gid)
        home.chmod(0o711)


def mount_checkout(scratch: Path) -> None:
    """Show the checkout at a place every user can reach, read-only, with its editable install intact.

    Its parts are mounted one by one, so a clone in a 0700 directory works too.
    """
    paths.MOUNTED.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", "mode=755,size=1m", "hpcserve-testbed", str(paths.MOUNTED))
    for part in sorted(paths.CHECKOUT.iterdir()):
        if part.name == ".git":
            continue
        target = paths.MOUNTED / part.name
        target.mkdir() if part.is_dir() else target.touch()
        _bind(part, target)
    for link in (paths.MOUNTED / ".venv").glob(f"lib/python3*/site-packages/{_EDITABLE}"):
        here = scratch / _EDITABLE
        here.write_text(f"{paths.MOUNTED}\n")
        here.chmod(0o644)
        _bind(here, link)


def unmount_checkout() -> None:
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    prefix = f"{paths.MOUNTED}/"
    for target in reversed([m for m in mounts if m == str(paths.MOUNTED) or m.startswith(prefix)]):
        subprocess.run(["umount", "--lazy", target], check=True)


def _bind(source: Path, target: Path) -> None:
    _mount("--bind", str(source), str(target))
    _mount("-o", "remount,bind,ro", str(target))


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)
