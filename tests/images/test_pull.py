"""Pulling an image, with stand-ins for apptainer and enroot."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpcserve.config.images import image_path, reference
from hpcserve.config.site import ContainerSite, NodeSite, Site
from hpcserve.errors import ConfigError, StorageError
from hpcserve.images.check import fault
from hpcserve.images.pull import Image, need_image, pull, registry_image
from tests.patience import DEADLINE

STUB = Path(__file__).with_name("stub_runtime.sh")
SUFFIX = {"apptainer": "sif", "pyxis": "sqsh"}


def sif(arch: bytes = b"02", body: int = 1000) -> bytes:
    """A SIF file as far as its header goes."""
    numbers = (1, 1, 47, 48, 128, 100, 228, body)
    head = struct.pack("<32s10s3s3s16s8q", b"#!/usr/bin/env run-singularity\n", b"SIF_MAGIC\0", b"01\0",
                       arch + b"\0", b"u" * 16, *numbers)  # fmt: skip
    return head + bytes(100 + body)


def squashfs(body: int = 1000) -> bytes:
    return struct.pack("<4s36xq", b"hsqs", 48 + body) + bytes(body)


WHOLE = {"apptainer": sif(), "pyxis": squashfs()}


class Registry:
    """The environment with stand-ins for the runtimes' programs, and what they were asked."""

    def __init__(self, root: Path, runtime: str = "apptainer") -> None:
        self.root = root
        self.runtime = runtime
        for program in ("apptainer", "enroot"):
            (root / "bin").mkdir(exist_ok=True)
            (root / "bin" / program).symlink_to(STUB)
        (root / "image").write_bytes(WHOLE[runtime])
        self.site = Site(
            name="here",
            node=NodeSite(gpus=0),
            container=ContainerSite(
                runtime=runtime,  # type: ignore[arg-type]
                image="docker://nvcr.io/nvidia/vllm:25.09",
                cache=f"{root}/cache",
            ),
        )

    def environ(self, do: str = "whole") -> dict[str, str]:
        return {
            "PATH": f"{self.root}/bin:{os.environ['PATH']}",
            "HOME": str(self.root),
            "STUB_DO": do,
            "STUB_CALLS": str(self.root / "calls"),
            "STUB_IMAGE": str(self.root / "image"),
            "STUB_GO": str(self.root / "go"),
        }

    @property
    def image(self) -> Image:
        found = registry_image(self.site, {})
        assert found is not None
        return found

    def pull(self, do: str = "whole") -> bool:
        return pull(self.image, self.environ(do), say=lambda _: None)

    def calls(self) -> list[str]:
        try:
            return (self.root / "calls").read_text().splitlines()
        except FileNotFoundError:
            return []

    def names(self) -> set[str]:
        return {path.name for path in (self.root / "cache").iterdir()}

    def process(self, do: str) -> subprocess.Popen[str]:
        """`hpcserve image pull` of the same site."""
        site = self.root / "here.yaml"
        container = self.site.container
        site.write_text(
            "name: here\nnode: {gpus: 0}\ncontainer:\n"
            f"  runtime: {container.runtime}\n  image: {container.image}\n  cache: {container.cache}\n"
        )
        return subprocess.Popen(
            [sys.executable, "-m", "hpcserve", "image", "pull", "--json", f"--site={site}"],
            env={**os.environ, **self.environ(do)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@pytest.fixture(params=["apptainer", "pyxis"])
def registry(tmp_path: Path, request: pytest.FixtureRequest) -> Registry:
    return Registry(tmp_path, request.param)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_image_is_pulled_once_and_its_digest_is_kept(registry: Registry) -> None:
    assert registry.pull() is True
    image = registry.image
    assert image.path.read_bytes() == WHOLE[registry.runtime]
    assert image.path.stat().st_mode & 0o777 == 0o644
    facts = json.loads(image.facts.read_text())
    assert facts["bytes"] == len(WHOLE[registry.runtime]) and len(facts["sha256"]) == 64
    assert registry.names() == {image.path.name, image.facts.name}
    need_image(registry.site, {})
    assert registry.pull() is False
    assert len(registry.calls()) == 1


def test_what_the_programs_are_told(registry: Registry) -> None:
    registry.pull()
    [call] = registry.calls()
    part = (
        f"{registry.root}/cache/.{registry.image.path.name}.part-000001-{socket.gethostname()}-{os.getpid()}"
    )
    target = f"{part}/{registry.image.path.name}"
    if registry.runtime == "apptainer":
        assert call.endswith(f"apptainer pull --arch amd64 {target} docker://nvcr.io/nvidia/vllm:25.09")
    else:
        assert call.endswith(
            f"enroot import --arch x86_64 --output {target} docker://nvcr.io#nvidia/vllm:25.09"
        )
    places = (registry.root / "calls.env").read_text().splitlines()
    mine = [place for place in places if part in place]
    assert len(mine) == (4 if registry.runtime == "apptainer" else 2)


def test_a_launch_needs_the_image_and_does_not_pull_it(registry: Registry) -> None:
    with pytest.raises(StorageError, match="was not pulled yet") as caught:
        need_image(registry.site, {})
    assert "hpcserve image pull --site here" in str(caught.value.hint)
    assert registry.calls() == []


@pytest.mark.parametrize(
    ("do", "told"),
    [
        ("fails", r"could not fetch docker://\S+ \(status 255\)"),
        ("full", r"status 1\)"),
        ("junk", "is not a (SIF|squashfs) file"),
        ("cut", "is cut off"),
    ],
)
def test_nothing_is_left_of_a_pull_that_failed(registry: Registry, do: str, told: str) -> None:
    with pytest.raises(StorageError, match=told) as caught:
        registry.pull(do)
    assert caught.value.hint
    assert registry.names() == set()
    assert registry.pull() is True


def test_an_image_that_changed_after_its_pull_is_refused(registry: Registry) -> None:
    registry.pull()
    with registry.image.path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(StorageError, match="were pulled"):
        need_image(registry.site, {})
    registry.image.path.write_bytes(WHOLE[registry.runtime][:300])
    with pytest.raises(StorageError, match="is cut off"):
        need_image(registry.site, {})


def test_a_sif_for_other_processors_is_refused(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    (tmp_path / "image").write_bytes(sif(arch=b"04"))
    with pytest.raises(StorageError, match="is for aarch64, and the site's nodes are x86_64"):
        registry.pull()


def test_without_the_program_it_is_said_which_one_is_meant(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    with pytest.raises(ConfigError, match="apptainer or singularity is not on this host"):
        pull(registry.image, {"PATH": "/nonexistent"}, say=print)


def test_a_full_disk_is_told_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(registry.image.path))

    monkeypatch.setattr("hpcserve.images.pull.os.replace", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        registry.pull()
    assert "container.cache" in str(caught.value.hint)
    assert registry.names() == set()


AS_OWNER = """
import os, sys
from pathlib import Path
from hpcserve.images.pull import _remove
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
left, stays = Path(sys.argv[1]), sys.argv[2] == "stays"
(left / "layer" / "etc").mkdir(parents=True)
(left / "layer" / "etc" / "passwd").write_text("x" * 10)
(left / "layer" / "link").symlink_to("/")
(left / "layer" / "etc").chmod(0o500)
(left / "layer").chmod(0)
if stays:
    left.parent.chmod(0o500)
_remove(left, print)
"""


@pytest.mark.parametrize("stays", [False, True])
def test_a_layers_directories_are_removed_whatever_their_modes_and_what_stays_is_told(
    tmp_path: Path, stays: bool
) -> None:
    """By another user than root, who may do anything."""
    with tempfile.TemporaryDirectory() as above:
        os.chmod(above, 0o777)
        left = Path(above, "cache", ".image.part-1")
        argv = [sys.executable, "-c", AS_OWNER, str(left), "stays" if stays else "goes"]
        left.parent.mkdir()
        if os.geteuid() == 0:
            os.chown(left.parent, 65534, 65534)
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert left.exists() == stays
        assert (str(left) in done.stdout and "rm -rf" in done.stdout) == stays
        left.parent.chmod(0o700)


def test_of_many_at_once_one_pulls_and_all_have_it(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    registry = Registry(tmp_path)
    started += [registry.process("hangs") for _ in range(4)]
    until(lambda: registry.calls())
    (tmp_path / "go").touch()
    answers = [process.communicate(timeout=DEADLINE) for process in started]
    assert [process.returncode for process in started] == [0] * 4, answers
    assert sorted(json.loads(out)["pulled"] for out, _ in answers) == [False] * 3 + [True]
    assert len(registry.calls()) == 1
    assert registry.names() == {registry.image.path.name, registry.image.facts.name}


def test_another_takes_over_from_one_that_was_killed(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    registry = Registry(tmp_path)
    doomed = registry.process("hangs")
    started.append(doomed)
    until(lambda: registry.calls())
    waiting = registry.process("whole")
    started.append(waiting)
    assert waiting.stderr is not None
    assert f"process {doomed.pid} on" in waiting.stderr.readline()
    assert len(registry.calls()) == 1
    os.killpg(doomed.pid, signal.SIGKILL)
    doomed.wait()
    out, errors = waiting.communicate(timeout=DEADLINE)
    answer = json.loads(out)
    assert (answer["image"], answer["pulled"]) == (str(registry.image.path), True), errors
    assert registry.names() == {registry.image.path.name, registry.image.facts.name}


@pytest.mark.parametrize("told", ['{"host": "elsewhere", "pid": 1, "started": "1"}', ""])
def test_an_owner_on_another_host_is_dead_when_it_is_silent(tmp_path: Path, told: str) -> None:
    """`""`: it died before it had written its name."""
    registry = Registry(tmp_path)
    lock = tmp_path / "cache" / f".{registry.image.path.name}.lock"
    lock.mkdir(parents=True)
    (lock / "000007").write_text(told)
    left = tmp_path / "cache" / f".{registry.image.path.name}.part-000007"
    left.mkdir()
    (left / "half").touch()
    assert pull(registry.image, registry.environ(), say=lambda _: None, silence=0.2) is True
    assert registry.names() == {registry.image.path.name, registry.image.facts.name}


def test_one_that_was_taken_for_dead_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path)
    lock = tmp_path / "cache" / f".{registry.image.path.name}.lock"

    def overtaken(*args: object, **kwargs: object) -> str | None:
        (lock / "000002").touch()
        return fault(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("hpcserve.images.pull.fault", overtaken)
    with pytest.raises(StorageError, match="took this one for dead"):
        registry.pull()
    assert registry.names() == {lock.name}
    assert {path.name for path in lock.iterdir()} == {"000001", "000002"}


@pytest.mark.parametrize(
    ("image", "apptainer", "enroot"),
    [
        (
            "docker://nvcr.io/nvidia/vllm:1",
            "docker://nvcr.io/nvidia/vllm:1",
            "docker://nvcr.io#nvidia/vllm:1",
        ),
        ("nvcr.io#nvidia/vllm:1", "docker://nvcr.io/nvidia/vllm:1", "docker://nvcr.io#nvidia/vllm:1"),
        ("vllm/vllm-openai:v1", "docker://vllm/vllm-openai:v1", "docker://vllm/vllm-openai:v1"),
        ("docker://docker.io/vllm/v:1", "docker://docker.io/vllm/v:1", "docker://vllm/v:1"),
        ("index.docker.io#vllm/v:1", "docker://index.docker.io/vllm/v:1", "docker://vllm/v:1"),
        ("localhost:5000/a", "docker://localhost:5000/a", "docker://localhost:5000#a"),
    ],
)
def test_both_runtimes_spellings_are_understood(image: str, apptainer: str, enroot: str) -> None:
    found = reference(image)
    assert found is not None
    assert (found.for_apptainer(), found.for_enroot()) == (apptainer, enroot)


@pytest.mark.parametrize("image", ["/i/x.sif", "x.sqsh", "~/x", "$SCRATCH/rootfs", "./x", "/rootfs"])
def test_files_are_not_taken_for_images_of_a_registry(image: str) -> None:
    assert reference(image) is None


def test_enroot_is_not_asked_for_what_it_does_not_know() -> None:
    container = ContainerSite(runtime="pyxis", image="oras://ghcr.io/a/b:1")
    with pytest.raises(ConfigError, match="enroot knows docker:// alone"):
        registry_image(Site(name="here", node=NodeSite(gpus=0), container=container), {})
    found = reference("oras://ghcr.io/a/b:1")
    assert found is not None and found.for_apptainer() == "oras://ghcr.io/a/b:1"


def test_where_a_pulled_image_lies() -> None:
    one = ContainerSite(runtime="apptainer", image="docker://a/b:1", cache="~/images")
    two = ContainerSite(runtime="apptainer", image="docker://a/b:2", cache="~/images")
    assert image_path(one).startswith("$HOME/images/a-b-1-") and image_path(one).endswith(".sif")
    assert image_path(one) != image_path(two)
    assert image_path(ContainerSite(runtime="pyxis", image="a/b:1")).endswith(".sqsh")
