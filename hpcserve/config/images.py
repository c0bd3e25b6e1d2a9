"""Where a container image is: a file the site names, or the file a registry's image is pulled into."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from .site import ContainerSite

_FILE = re.compile(r"[~/.$].*|.*\.(sif|sqsh|squashfs|img)")
_SCHEME = re.compile(r"([a-z]+)://(.*)", re.DOTALL)
_DOCKER_HUB = ("docker.io", "index.docker.io")
SUFFIXES = {"apptainer": ".sif", "pyxis": ".sqsh"}


@dataclass(frozen=True, slots=True)
class Reference:
    """An image in a registry."""

    scheme: str
    """`docker`, or another one that Apptainer knows, such as `oras`."""
    registry: str | None
    """None: the runtime's default, Docker Hub."""
    name: str
    """`nvidia/vllm:25.09`, or with a digest, `vllm/vllm-openai@sha256:…`."""

    def for_apptainer(self) -> str:
        return f"{self.scheme}://{'/'.join(filter(None, (self.registry, self.name)))}"

    def for_enroot(self) -> str:
        """enroot sets the registry apart by a `#` (doc/cmd/import.md). Its default is Docker Hub, whose other
        names it does not know (up to 4.1): they answer with a web page."""
        registry = None if self.registry in _DOCKER_HUB else self.registry
        return f"docker://{'#'.join(filter(None, (registry, self.name)))}"


def reference(image: str) -> Reference | None:
    """The registry's image that `container.image` names; None for a file or directory.

    Takes the spellings of both runtimes: `docker://nvcr.io/nvidia/vllm:1`, `nvcr.io#nvidia/vllm:1`.
    """
    if _FILE.fullmatch(image):
        return None
    found = _SCHEME.fullmatch(image)
    scheme, rest = (found[1], found[2]) if found else ("docker", image)
    registry, hash_sign, name = rest.partition("#")
    if hash_sign:
        return Reference(scheme, registry, name)
    first, slash, name = rest.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return Reference(scheme, first, name)
    return Reference(scheme, None, rest)


def image_path(container: ContainerSite) -> str:
    """The image's file on the nodes; `$VARS` and a leading `$HOME` are left to the shell there.

    A pulled image has the digest of its reference in its name, so that two never meet in one file.
    """
    assert container.image is not None, "a plan with a container has an image"
    pulled = reference(container.image)
    if pulled is None:
        path = container.image
    else:
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", pulled.name).strip("-")[-60:]
        digest = hashlib.sha256(pulled.for_apptainer().encode()).hexdigest()[:12]
        suffix = SUFFIXES[container.runtime]
        path = f"{container.cache.rstrip('/')}/{readable}-{digest}{suffix}"
    return f"$HOME{path[1:]}" if path.startswith("~/") else path
