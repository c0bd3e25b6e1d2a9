"""A registry with one image, on loopback: as much of the OCI distribution protocol as a pull needs."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _image() -> tuple[bytes, dict[str, bytes]]:
    """A manifest, and the blobs it names: a configuration, and a layer of one file."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        info = tarfile.TarInfo("etc/made-of")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"test"))
    packed = gzip.compress(layer.getvalue())
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Env": ["PATH=/usr/bin:/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer.getvalue())]},
        }
    ).encode()
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": _digest(config),
                "size": len(config),
            },
            "layers": [
                {
                    "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                    "digest": _digest(packed),
                    "size": len(packed),
                }
            ],
        }
    ).encode()
    return manifest, {_digest(config): config, _digest(packed): packed}


@contextmanager
def registry() -> Iterator[str]:
    """`HOST:PORT/IMAGE:TAG` while the registry is up; every other name is unknown there."""
    manifest, blobs = _image()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            what = self.path.rsplit("/", 1)[-1]
            if self.path == "/v2/":
                self._answer(200, b"{}", "application/json")
            elif self.path in (
                "/v2/tests/image/manifests/1",
                f"/v2/tests/image/manifests/{_digest(manifest)}",
            ):
                self._answer(200, manifest, _MANIFEST)
            elif what in blobs:
                self._answer(200, blobs[what], "application/octet-stream")
            else:
                unknown = b'{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "unknown"}]}'
                self._answer(404, unknown, "application/json")

        def _answer(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Docker-Content-Digest", _digest(body))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}/tests/image:1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
