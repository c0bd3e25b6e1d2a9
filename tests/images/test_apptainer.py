"""`apptainer pull` itself, from a registry on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hpcserve.config.site import ContainerSite, NodeSite, Site
from hpcserve.errors import StorageError
from hpcserve.images.pull import Image, need_image, pull, registry_image
from tests.cluster import paths

from .registry import registry

APPTAINER = paths.APPTAINER if paths.APPTAINER.exists() else Path(shutil.which("apptainer") or "/none")
pytestmark = pytest.mark.skipif(
    not APPTAINER.exists(), reason="no Apptainer: tests/cluster/install_apptainer.sh installs it on Debian 12"
)


def image_of(name: str, cache: Path) -> tuple[Site, Image]:
    container = ContainerSite(runtime="apptainer", image=f"docker://{name}", cache=str(cache))
    site = Site(name="here", node=NodeSite(gpus=0), container=container)
    found = registry_image(site, {})
    assert found is not None
    return site, found


def environ() -> dict[str, str]:
    return {**os.environ, "PATH": f"{APPTAINER.parent}:{os.environ['PATH']}", "APPTAINER_NOHTTPS": "1"}


def test_an_image_of_a_registry_becomes_a_sif_with_its_files(tmp_path: Path) -> None:
    with registry() as name:
        site, image = image_of(name, tmp_path / "cache")
        assert pull(image, environ(), say=print) is True
        assert pull(image, environ(), say=print) is False
    need_image(site, {})
    assert json.loads(image.facts.read_text())["reference"] == f"docker://{name}"
    assert {path.name for path in image.path.parent.iterdir()} == {image.path.name, image.facts.name}
    partitions = subprocess.run(
        [APPTAINER, "sif", "list", image.path], capture_output=True, text=True, check=True
    )
    assert "Squashfs" in partitions.stdout


def test_an_image_that_the_registry_does_not_know_leaves_nothing(tmp_path: Path) -> None:
    with registry() as name:
        _, image = image_of(f"{name}-other", tmp_path / "cache")
        with pytest.raises(StorageError, match="could not fetch"):
            pull(image, environ(), say=print)
    assert list(image.path.parent.iterdir()) == []
