"""Which files of a model are staged, and what happens when they are not what they were."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from hpcserve.errors import StorageError
from hpcserve.node.staging.source import SourceFile, list_model, open_source, read_at

from .nodes import make_model


def names(model: Path) -> list[str]:
    return [file.name for file in list_model(str(model)).files]


def test_weights_of_other_formats_stay_beside_safetensors(tmp_path: Path) -> None:
    unread = (
        "consolidated.00.pth",
        "model.Q4.gguf",
        "pytorch_model-1.bin",
        "original/params.json",
        ".git/HEAD",
    )
    wanted = ("model-1.safetensors", "consolidated.safetensors", "tokenizer.model", "sub/original/x.json")
    files = {name: b"x" for name in (*unread, *wanted) if name.count("/") < 2}
    model = make_model(tmp_path / "m", files)
    (model / "sub" / "original").mkdir(parents=True)
    (model / "sub" / "original" / "x.json").write_text("{}")
    assert names(model) == sorted(["config.json", *wanted])


def test_without_safetensors_other_weights_are_the_model(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", {"pytorch_model-1.bin": b"x", "model.gguf": b"x"})
    assert names(model) == ["config.json", "model.gguf", "pytorch_model-1.bin"]


def test_links_are_followed_and_never_in_a_circle(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / "a").write_bytes(b"12345")
    model = make_model(tmp_path / "snapshots" / "abc", {"tokenizer.json": b"{}"})
    (model / "model.safetensors").symlink_to("../../blobs/a")
    (model / "extra").mkdir()
    (model / "extra" / "up").symlink_to("..")
    found = {file.name: file.size for file in list_model(str(model)).files}
    assert found == {"config.json": 2, "model.safetensors": 5, "tokenizer.json": 2}


@pytest.mark.parametrize("change", ["size", "time", "config", "name", "path"])
def test_the_fingerprint_tells_models_apart(tmp_path: Path, change: str) -> None:
    model = make_model(tmp_path / "m", {"a.safetensors": b"1"})
    times = (model / "a.safetensors").stat()
    before = list_model(str(model)).fingerprint
    assert list_model(str(model)).fingerprint == before
    match change:
        case "size":
            (model / "a.safetensors").write_bytes(b"12")
            os.utime(model / "a.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
        case "time":
            os.utime(model / "a.safetensors", ns=(1, 1))
        case "config":
            config = (model / "config.json").stat()
            (model / "config.json").write_text("[]")
            os.utime(model / "config.json", ns=(config.st_atime_ns, config.st_mtime_ns))
        case "name":
            (model / "a.safetensors").rename(model / "b.safetensors")
        case "path":
            model = model.rename(tmp_path / "n")
    assert list_model(str(model)).fingerprint != before


@pytest.mark.parametrize(
    ("path", "name"), [("/a/Llama-3", "Llama-3"), ("/a/Llama-3/", "Llama-3"), ("/", "model")]
)
def test_a_copy_has_the_models_name(path: str, name: str) -> None:
    from hpcserve.node.staging.source import Listing

    assert Listing(path=path, fingerprint="f", files=()).name == name


def test_an_old_view_of_a_file_is_looked_at_again(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"old")
    wanted = SourceFile(name=file.name, size=9, mtime_ns=5 * 10**9 + 7)

    def refresh() -> None:
        file.write_bytes(b"new bytes")
        os.utime(file, ns=(0, 5 * 10**9))  # the server rounds

    later = threading.Timer(0.2, refresh)
    later.start()
    opened = open_source(str(tmp_path), wanted, pauses=(0.1,) * 100)
    later.join()
    buffer = memoryview(bytearray(9))
    read_at(opened, buffer, 0, wanted)
    os.close(opened)
    assert bytes(buffer) == b"new bytes"


def test_a_file_that_stays_old_is_an_error_with_both_sizes(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"old")
    wanted = SourceFile(name="a.safetensors", size=9, mtime_ns=0)
    with pytest.raises(StorageError, match=r"has 3 bytes of .* on this node, and on the head node 9 bytes"):
        open_source(str(tmp_path), wanted, pauses=(0.01,))


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"123456789")
    status = file.stat()
    wanted = SourceFile(name=file.name, size=9, mtime_ns=status.st_mtime_ns)
    opened = open_source(str(tmp_path), wanted)
    os.truncate(file, 4)
    with pytest.raises(StorageError, match="became shorter"):
        read_at(opened, memoryview(bytearray(9)), 0, wanted)
    os.close(opened)
