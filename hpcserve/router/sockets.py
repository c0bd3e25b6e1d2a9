"""The sockets an endpoint listens on."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from ..errors import ConfigError
from ..http import server

_BACKLOG = 2048


def bind_all(host: str, ports: tuple[int, int], count: int) -> list[socket.socket]:
    """`count` sockets that listen on the first free port of a range; connections are spread over them.

    Linux lets only processes of the same user join a port, and the sockets stay with the supervisor, so
    the port can't be taken while a relay is being started again. Raises ConfigError.
    """
    first = _first(host, ports)
    sockets = [first]
    # Set only now: with it, binding would also succeed where another router of this user listens.
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    for _ in range(count - 1):
        sock = socket.socket(first.family, socket.SOCK_STREAM)
        sockets.append(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(first.getsockname()[:2])
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    return sockets


def _first(host: str, ports: tuple[int, int]) -> socket.socket:
    for port in range(ports[0], ports[1] + 1):
        try:
            return server.bind(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(
                    f"can't listen on {host}:{port}: {error.strerror or error}",
                    hint="choose another `router.port`, or the site's port range",
                ) from error
    where = f"port {ports[0]}" if ports[0] == ports[1] else f"every port of {ports[0]}-{ports[1]}"
    raise ConfigError(
        f"{where} on {host} is taken", hint="choose another `router.port`, or a wider port range for the site"
    )


def bind_unix(path: Path) -> socket.socket:
    """A listening Unix socket that its owner alone can connect to. Raises ConfigError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        before = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"can't listen on the Unix socket {path}: {error.strerror or error}",
            hint="give a path of at most 107 bytes in a writable directory, that no other router uses",
        ) from error
    sock.setblocking(False)
    return sock


def _remove_stale(path: Path) -> None:
    """Remove the socket of a router that is gone; one that answers is left, and binding fails."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
