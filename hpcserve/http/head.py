"""What a request's head must be, beyond what the parser checks."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

import httptools

from .errors import Header, HttpError

log = logging.getLogger(__name__)

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_ABSOLUTE = re.compile(r"https?://[^/?#@]+(?=[/?]|\Z)", re.IGNORECASE)
# RFC 3986 §3.2.2 and §3.2.3: a name, an IPv4 address or an IPv6 address in brackets, and a port.
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+(?:%[0-9A-Za-z._~-]+)?\]|[0-9A-Za-z._~!$&'()*+,;=%-]*)(?::[0-9]*)?")
# What some gateways behind us would read as the framing of the body.
_LOOK_ALIKES = frozenset({b"content_length", b"transfer_encoding"})
_LOOKED_AT = frozenset({b"host", b"content-length", b"transfer-encoding", b"expect"}) | _LOOK_ALIKES
# Paths that all software reads alike. Most requests end here.
_PLAIN = re.compile(r"(?:/[0-9A-Za-z_-][0-9A-Za-z._-]*)+")
_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
# RFC 3986 §2.3: letters, digits, `-`, `.`, `_` and `~` mean the same with and without escape.
_NEEDLESS_ESCAPE = re.compile(r"%(?:2[DdEe]|3[0-9]|4[1-9A-Fa-f]|5[0-9AaFf]|6[1-9A-Fa-f]|7[0-9AaEe])")


class Head(NamedTuple):
    """A head that can be answered."""

    target: str
    """Path and query as they came, or `*`."""
    path: str
    """The path, its escapes decoded once: what an engine compares with its routes."""
    length: int | None
    """Content-Length."""
    framing: Header | None
    """The header that says where the body ends; None without a body."""
    expects_continue: bool


def read_head(method: str, version: str, url: bytes, headers: Sequence[Header]) -> Head:
    """Raises HttpError for a head that is not served, or that others may read differently."""
    if version not in ("1.0", "1.1"):
        raise HttpError(505, "HTTP/1.1 and HTTP/1.0 are spoken here")
    if method not in _METHODS:
        raise HttpError(501, f"method {method} is not supported")
    hosts = 0
    length: int | None = None
    framing: Header | None = None
    expects_continue = False
    for name, value in headers:
        if name not in _LOOKED_AT:
            continue
        if name == b"host":
            hosts += 1
            if not _HOST.fullmatch(value):
                raise HttpError(400, "the Host header must be a name or an address, and a port")
        elif name == b"content-length":
            length = int(value)
            framing = (name, value) if length else None
        elif name == b"transfer-encoding":
            if version != "1.1":
                raise HttpError(400, "Transfer-Encoding needs HTTP/1.1")
            if value.lower() != b"chunked":
                raise HttpError(501, "the only Transfer-Encoding understood is chunked")
            framing = (name, value)
        elif name == b"expect":
            if value.lower() != b"100-continue":
                raise HttpError(417, "the only Expect understood is 100-continue")
            expects_continue = version == "1.1"
        else:
            raise HttpError(400, f"the header {name.decode()} can be mistaken for one that frames the body")
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        raise HttpError(400, f"the request has {hosts or 'no'} Host headers, one is needed")
    target = _target(method, url)
    path = _path(target)
    return Head(target=target, path=path, length=length, framing=framing, expects_continue=expects_continue)


def _target(method: str, url: bytes) -> str:
    target = url.decode("ascii")
    if "#" in target:
        raise HttpError(400, "the request target must have no fragment (`#`)")
    absolute = _ABSOLUTE.match(target)
    if absolute is not None:
        target = target[absolute.end() :]
        if not target.startswith("/"):
            target = f"/{target}"
    if not target.startswith("/") and (target != "*" or method != "OPTIONS"):
        raise HttpError(400, "the request target must be a path")
    return target


def _path(target: str) -> str:
    """The decoded path. Raises HttpError 400 for one that two programs may take for different routes."""
    path = target.partition("?")[0]
    if _PLAIN.fullmatch(path) or path == "*":
        return path
    if _BROKEN_ESCAPE.search(path):
        raise HttpError(400, "the path has a `%` without two hexadecimal digits after it")
    if _NEEDLESS_ESCAPE.search(path):
        raise HttpError(400, "the path escapes a letter, a digit or one of `-._~`; write it as it is")
    try:
        decoded = unquote_to_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise HttpError(400, "the path is not UTF-8") from None
    if not decoded.isprintable() or "\\" in decoded or "%" in decoded:
        raise HttpError(400, "the path has a control character, a backslash or an escaped `%`")
    segments = decoded.split("/")[1:]
    # Some servers cut `;…` off a segment before they look at it.
    if "" in segments[:-1] or any(segment.partition(";")[0] in (".", "..") for segment in segments):
        raise HttpError(400, "the path has an empty segment, `.` or `..`")
    return decoded


def head_too_large(limit: int) -> HttpError:
    """Above `limit` bytes."""
    return HttpError(431, f"the request line and headers are larger than {limit} bytes")


def malformed(error: httptools.HttpParserError) -> HttpError:
    """What the parser did not understand, or what a callback of its raised."""
    if isinstance(error, httptools.HttpParserCallbackError):
        log.error("parsing a request failed", exc_info=error)
        return HttpError(500, "internal error")
    text = str(error)
    if "Invalid HTTP version" in text or "PRI" in text:
        return HttpError(505, "HTTP/1.1 and HTTP/1.0 are spoken here")
    return HttpError(400, f"malformed HTTP: {text}")
