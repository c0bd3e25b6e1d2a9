"""Fetch an image of a registry into the site's cache: once, however many ask for it at one time.

The runtime's own program does it (`apptainer pull`, `enroot import`), into a directory beside the target that
belongs to the owner of the lock. The file is checked, its digest is written beside it, and a rename shows
it to others. What a dead process left is removed by the next.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config.images import Reference, image_path, reference
from ..config.site import Site
from ..errors import ConfigError, StorageError
from ..rundir.atomic import read_json, storage_error, write_json
from . import lock
from .check import check_image, fault

_PROGRAMS = {"apptainer": ("apptainer", "singularity"), "pyxis": ("enroot",)}
_GO_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_SPACE = "free space there, or set `container.cache` of the site to a larger file system"
Runtime = Literal["pyxis", "apptainer"]


@dataclass(frozen=True, slots=True)
class Image:
    """Where a site's image of a registry is, or will be."""

    reference: Reference
    path: Path
    runtime: Runtime
    arch: str

    @property
    def facts(self) -> Path:
        """What is known about the file: reference, size, digest, when and by what it was pulled."""
        return self.path.with_name(f"{self.path.name}.json")


def registry_image(site: Site, environ: Mapping[str, str]) -> Image | None:
    """The image that must be pulled before a launch; None for a site without, or with a plain file.

    Raises ConfigError when `container.cache` is no absolute path, and for an image that enroot can't pull.
    """
    container = site.container
    if container.runtime == "none" or container.image is None:
        return None
    found = reference(container.image)
    if found is None:
        return None
    if container.runtime == "pyxis" and found.scheme != "docker":
        raise ConfigError(
            f"container.image of site {site.name} is {container.image}, and enroot knows docker:// alone",
            hint="name a docker image, or convert that one to a .sqsh file and name the file",
        )
    text = os.path.expandvars(image_path(container))
    if "$" in text or not text.startswith("/"):
        raise ConfigError(
            f"`container.cache` of site {site.name}: {text!r} is not an absolute path once ~ and $VARIABLES "
            "are filled in",
            hint="name a directory that all nodes share",
        )
    return Image(found, Path(text), container.runtime, site.node.arch)


def need_image(site: Site, environ: Mapping[str, str]) -> None:
    """Raises StorageError when the image was not pulled yet, or is not what was pulled. It reads a header."""
    image = registry_image(site, environ)
    if image is None:
        return
    if not image.path.exists():
        raise StorageError(
            f"the image {site.container.image} of site {site.name} was not pulled yet: "
            f"{image.path} does not exist",
            hint=f"run `hpcserve image pull --site {site.name}` once; it can take long, so no launch does it",
        )
    check_image(image.path, runtime=image.runtime, arch=image.arch)
    _check_size(image)


def pull(
    image: Image,
    environ: Mapping[str, str],
    *,
    say: Callable[[str], None],
    silence: float = lock.SILENCE,
    heartbeat: float = lock.HEARTBEAT,
) -> bool:
    """Fetch the image, or wait for another process that does. False: it was there.

    Raises StorageError when it can't be fetched or stored, ConfigError without the runtime's program.
    """
    program = _program(image.runtime, environ)
    try:
        image.path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, "make", hint="set `container.cache` of the site") from error

    def waiting(owner: lock.Owner) -> None:
        say(f"{owner} pulls it already; waiting")

    directory = image.path.with_name(f".{image.path.name}.lock")
    with lock.hold(directory, waiting=waiting, silence=silence, heartbeat=heartbeat) as held:
        _sweep(image, held, say)
        if image.path.exists():
            check_image(image.path, runtime=image.runtime, arch=image.arch)
            _check_size(image)
            return False
        work = image.path.with_name(f".{image.path.name}.part-{held.token}")
        try:
            _fetch(image, work, program, environ)
            _publish(image, work, program, held)
        finally:
            _remove(work, say)
    return True


def _program(runtime: Runtime, environ: Mapping[str, str]) -> str:
    for name in _PROGRAMS[runtime]:
        found = shutil.which(name, path=environ.get("PATH"))
        if found is not None:
            return found
    raise ConfigError(
        f"{' or '.join(_PROGRAMS[runtime])} is not on this host, so it can't pull an image",
        hint="load its module here, or pull on a host that has it (a compute node, in a small job)",
    )


def _sweep(image: Image, held: lock.Lock, say: Callable[[str], None]) -> None:
    """Remove what owners left who died: nobody but the holder of the lock works here."""
    for left in image.path.parent.glob(f".{image.path.name}.part-*"):
        if not left.name.endswith(held.token):
            _remove(left, say)


def _remove(directory: Path, say: Callable[[str], None]) -> None:
    """Remove what a pull left; what resists is told. Layers may have directories their owner can't write."""
    shutil.rmtree(directory, ignore_errors=True)
    if not directory.exists():
        return
    for parent, names, _ in os.walk(directory):
        for name in names:
            path = os.path.join(parent, name)
            with suppress(OSError):
                if not os.path.islink(path):
                    os.chmod(path, 0o700)
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        sizes = []
        for parent, _, names in os.walk(directory):
            for name in names:
                with suppress(OSError):
                    sizes.append(os.lstat(os.path.join(parent, name)).st_size)
        say(f"warning: {directory} can't be removed; what can be seen there has {sum(sizes)} bytes")
        say(f"hint: it is of no use any more: remove it by hand (`rm -rf {directory}`)")


def _fetch(image: Image, work: Path, program: str, environ: Mapping[str, str]) -> None:
    """Run the runtime's program with all its temporary files on the file system of the target.

    Their usual places, /tmp of a login node and the home directory, are too small for such images.
    """
    target = work / image.path.name
    arch = image.arch
    if image.runtime == "apptainer":
        argv = [
            program,
            "pull",
            "--arch",
            _GO_ARCHITECTURES[arch],
            str(target),
            image.reference.for_apptainer(),
        ]
        places = {
            f"{kind}_{what}": str(work / what.lower())
            for kind in ("APPTAINER", "SINGULARITY")
            for what in ("CACHEDIR", "TMPDIR")
        }
    else:
        argv = [program, "import", "--arch", arch, "--output", str(target), image.reference.for_enroot()]
        places = {f"ENROOT_{what}": str(work / what.lower()) for what in ("CACHE_PATH", "TEMP_PATH")}
    chosen = {name: place for name, place in places.items() if name not in environ}
    try:
        # A token of an owner that died long ago may have come again.
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(mode=0o700)
        for place in set(chosen.values()):
            Path(place).mkdir()
        # Its progress goes where people look; stdout may be for a program that reads ours.
        done = subprocess.run(argv, env={**environ, **chosen}, stdin=subprocess.DEVNULL, stdout=2)
    except OSError as error:
        raise storage_error(error, "pull into", hint=_SPACE) from error
    if done.returncode:
        free = shutil.disk_usage(work).free
        raise StorageError(
            f"{argv[0]} could not fetch {argv[-1]} (status {done.returncode}); its own message is above",
            hint=f"{free >> 30} GiB are free in {image.path.parent}; is the name right, and are you logged "
            "in to that registry?",
        )


def _publish(image: Image, work: Path, program: str, held: lock.Lock) -> None:
    target = work / image.path.name
    wrong = fault(target, runtime=image.runtime, arch=image.arch)
    if wrong is not None:
        raise StorageError(
            f"{program} fetched {image.reference.for_apptainer()}, but the file {wrong}",
            hint="pull again; if it stays so, look at the image's name and at `node.arch` of the site",
        )
    try:
        with target.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        size = target.stat().st_size
        target.chmod(0o644)
    except OSError as error:
        raise storage_error(error, "read", hint=_SPACE) from error
    if not held.held():
        raise StorageError(
            f"another process took this one for dead and pulls {image.path} itself",
            hint="was this host suspended? wait for the other one",
        )
    facts = {
        "reference": image.reference.for_apptainer(),
        "bytes": size,
        "sha256": digest,
        "pulled": round(time.time()),
        "program": program,
    }
    try:
        # Facts about an earlier file, which somebody removed, would be held against this one.
        image.facts.unlink(missing_ok=True)
        os.replace(target, image.path)
    except OSError as error:
        raise storage_error(error, "write", hint=_SPACE) from error
    write_json(image.facts, facts, mode=0o644)


def _check_size(image: Image) -> None:
    try:
        wanted = read_json(image.facts)["bytes"]
    except FileNotFoundError:
        return  # put there by hand, or this moment
    size = image.path.stat().st_size
    if size != wanted:
        raise StorageError(
            f"the image {image.path} has {size} bytes, and {wanted} were pulled",
            hint="remove it and run `hpcserve image pull` again",
        )
