"""Request lines and headers (RFC 9112 §2 to §5), and connections that turn into something else."""

from __future__ import annotations

from .case import NEXT, READ, Case, Got, get, head, post, refused, served


def _get(*lines: bytes) -> bytes:
    return head(*lines, method=b"GET")


def _line(line: bytes) -> bytes:
    return line + b"\r\nHost: x\r\n\r\n"


LINES: dict[str, Case] = {
    "a bare LF after the request line": refused(b"GET / HTTP/1.1\nHost: x\n\n"),
    "a bare CR after the request line": refused(b"GET / HTTP/1.1\rHost: x\r\n\r\n"),
    "two CRs after the request line": refused(b"GET / HTTP/1.1\r\r\nHost: x\r\n\r\n"),
    "a space after the version": refused(_line(b"GET / HTTP/1.1 ")),
    "a space before the method": refused(_line(b" GET / HTTP/1.1")),
    "tabs in the request line": refused(_line(b"GET\t/\tHTTP/1.1")),
    "a space in the target": refused(_line(b"GET /a b HTTP/1.1")),
    "a request in the target": refused(_line(b"GET /v1/a HTTP/1.1 HTTP/1.1")),
    "HTTP/0.9": refused(b"GET /\r\n"),
    "HTTP/0.9 with headers": refused(_line(b"GET /"), 505),
    "HTTP/1.2": refused(_line(b"GET / HTTP/1.2"), 505),
    "HTTP/1": refused(_line(b"GET / HTTP/1")),
    "HTTP/11": refused(_line(b"GET / HTTP/11")),
    "HTTP/01.1": refused(_line(b"GET / HTTP/01.1")),
    "HTTP/1.10": refused(_line(b"GET / HTTP/1.10")),
    "http/1.1": refused(_line(b"GET / http/1.1")),
    "HTTP/2.0 in words": refused(_line(b"GET / HTTP/2.0"), 505),
    "HTTP/3.0 in words": refused(_line(b"GET / HTTP/3.0"), 505),
    "HTTP/2 without negotiation": refused(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "another protocol": refused(_line(b"GET / ICE/1.0")),
    "TLS": refused(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    "a proxy's own protocol": refused(b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n" + _get()),
    "a lower-case method": refused(_line(b"get / HTTP/1.1")),
    "an unknown method": refused(_line(b"FOO / HTTP/1.1")),
    "a method that goes on": refused(_line(b"GETX / HTTP/1.1")),
    "a method in quotes": refused(_line(b'"GET" / HTTP/1.1')),
    "TRACE": refused(_line(b"TRACE / HTTP/1.1"), 501),
    "CONNECT": refused(b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", 501),
    "CONNECT with a body": refused(b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nContent-Length: 3\r\n\r\n{ }", 501),
    # RFC 9112 §2.2 wants an empty line before a request ignored.
    "empty lines before the request": served(b"\r\n\r\n" + _get(), get()),
    # Lenient as RFC 9112 §3 allows, and without harm: the router writes the line anew.
    "two spaces after the method": served(_line(b"GET  /version HTTP/1.1"), get()),
    "two spaces after the target": served(_line(b"GET /version  HTTP/1.1"), get()),
}

HEADERS: dict[str, Case] = {
    "space before a colon": refused(_get(b"X-A : b")),
    "a folded header": refused(_get(b"X-A: b\r\n c")),
    "a header folded with a tab": refused(_get(b"X-A: b\r\n\tc")),
    "a header folded at its start": refused(_get(b"X-A:\r\n b")),
    "a folded line before all headers": refused(b"GET / HTTP/1.1\r\n X: y\r\nHost: x\r\n\r\n"),
    "a bare LF after a header": refused(b"GET / HTTP/1.1\r\nHost: x\nA: b\r\n\r\n"),
    "a bare CR after a header": refused(b"GET / HTTP/1.1\r\nHost: x\rA: b\r\n\r\n"),
    "a bare CR before a header": refused(b"GET / HTTP/1.1\r\nHost: x\r\n\rX: y\r\n\r\n"),
    "a bare LF at the head's end": refused(b"GET / HTTP/1.1\r\nHost: x\r\n\n"),
    "two CRs at the head's end": refused(b"GET / HTTP/1.1\r\nHost: x\r\n\r\r"),
    "a NUL in a header": refused(_get(b"A: b\0c")),
    "a NUL in a header's name": refused(_get(b"A\0: b")),
    "a control character in a header": refused(_get(b"A: b\x01c")),
    "a DEL in a header": refused(_get(b"A: b\x7fc")),
    "a space in a header's name": refused(_get(b"Ho st: x")),
    "a parenthesis in a header's name": refused(_get(b"A(b): x")),
    "a quoted header name": refused(_get(b'"a": x')),
    "a header name beyond ASCII": refused(_get("é: x".encode())),
    "an empty header name": refused(_get(b": x")),
    "a header without a colon": refused(_get(b"Abc")),
    "a head above the limit": refused(_get(b"A: " + b"a" * 70_000), 431),
    "a target above the limit": refused(head(method=b"GET", target=b"/" + b"a" * 70_000), 431),
    "an endless head": refused(b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 200_000, 431),
    "an endless header name": refused(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a" * 200_000, 431),
    "an endless target": refused(b"GET /" + b"a" * 200_000, 431),
    "too many headers": refused(_get(*[b"a: b"] * 300), 431),
    "no Host": refused(b"GET / HTTP/1.1\r\n\r\n"),
    "two Hosts": refused(b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
    "two Hosts that agree": refused(_get(b"Host: x")),
    "a Host with a space": refused(b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n"),
    "a Host with a path": refused(b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"),
    "a Host with a user": refused(b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n"),
    "a Host with a port that is no number": refused(b"GET / HTTP/1.1\r\nHost: a:b\r\n\r\n"),
    "a Host that is a list": refused(b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n"),
    "a Host beyond ASCII": refused(b"GET / HTTP/1.1\r\nHost: \xc3\xa9\r\n\r\n"),
    "an unknown expectation": refused(head(b"Expect: magic", b"Content-Length: 1"), 417),
    "a list of expectations": refused(head(b"Expect: 100-continue, magic", b"Content-Length: 1"), 417),
    "an empty Host": served(b"GET /version HTTP/1.1\r\nHost:\r\n\r\n", get()),
    "an IPv6 Host": served(b"GET /version HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", get()),
    "no Host in HTTP/1.0": served(b"GET /version HTTP/1.0\r\n\r\n", get(), goes_on=False),
    "an empty header": served(_get(b"A:"), get()),
    "a header beyond ASCII": served(_get(b"A: \xff\xfe"), get()),
    "ninety headers": served(_get(*[b"a: b"] * 90), get()),
    "connection options that name our headers": served(
        head(b"Connection: host, content-length, x-request-id, content-type", b"Content-Length: 3") + b"{ }",
        post(),
    ),
    "an expectation whose body is there": served(
        head(b"Expect: 100-continue", b"Content-Length: 3") + b"{ }", post()
    ),
    "an expectation twice": served(
        head(b"Expect: 100-continue", b"Expect: 100-continue", b"Content-Length: 3") + b"{ }", post()
    ),
    "an expectation without a body": served(_get(b"Expect: 100-continue"), get()),
    "an expectation in HTTP/1.0": served(
        head(b"Expect: 100-continue", b"Content-Length: 3", version=b"1.0") + b"{ }", post(), goes_on=False
    ),
}

_H2C = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")

CONNECTIONS: dict[str, Case] = {
    # Java's client and `curl --http2` ask for it with each request; a server may just answer.
    "an upgrade to HTTP/2 with a body": served(head(*_H2C, b"Content-Length: 3") + b"{ }", post()),
    "an upgrade to HTTP/2 with chunks": served(
        head(*_H2C, b"Transfer-Encoding: chunked") + b"3\r\n{ }\r\n0\r\n\r\n", post()
    ),
    "an upgrade to HTTP/2 without a body": served(_get(*_H2C), get()),
    "an upgrade with HTTP/2 behind it": Case(
        data=_get(*_H2C) + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", status=200, got=(get(),)
    ),
    "an upgrade to a WebSocket": served(_get(b"Connection: Upgrade", b"Upgrade: websocket"), get()),
    "an upgrade with length and chunks": refused(
        head(*_H2C, b"Content-Length: 3", b"Transfer-Encoding: chunked") + b"0\r\n\r\n"
    ),
    "an upgrade with broken chunks": refused(head(*_H2C, b"Transfer-Encoding: chunked") + b"zz\r\n"),
    "a request behind Connection: close": served(_get(b"Connection: close"), get(), goes_on=False),
    "both connection options": served(_get(b"Connection: close, keep-alive"), get(), goes_on=False),
    "HTTP/1.0": served(head(b"Content-Length: 3", version=b"1.0") + b"{ }", post(), goes_on=False),
    "HTTP/1.0 that stays": served(
        head(b"Connection: keep-alive", b"Content-Length: 3", version=b"1.0") + b"{ }", post()
    ),
    "HEAD": served(head(method=b"HEAD"), Got(method="HEAD", target=READ.decode())),
    "three requests at once": Case(
        data=head(b"Content-Length: 3") + b"{ }" + NEXT + head(b"Content-Length: 2") + b"{}",
        status=200,
        got=(post(), get("/version?next"), post(b"{}")),
        goes_on=True,
    ),
    "a good request and a broken one": Case(data=_get() + b"GET / HTTP/1.1\n", status=200, got=(get(),)),
}

HEADS = {**LINES, **HEADERS, **CONNECTIONS}
