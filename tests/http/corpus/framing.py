"""Where a body ends: Content-Length, Transfer-Encoding and chunks (RFC 9112 §6 and §7)."""

from __future__ import annotations

from .case import READ, Case, Got, get, head, post, refused, served

CHUNKED = head(b"Transfer-Encoding: chunked")
_END = b"0\r\n\r\n"


def _length(value: bytes, body: bytes = b"{ }") -> bytes:
    return head(b"Content-Length:" + value) + body


def _coding(*lines: bytes) -> bytes:
    return head(*lines) + b"3\r\n{ }\r\n" + _END


LENGTHS: dict[str, Case] = {
    "two lengths that differ": refused(head(b"Content-Length: 3", b"Content-Length: 4") + b"{ }d"),
    "two lengths that agree": refused(head(b"Content-Length: 3", b"Content-Length: 3") + b"{ }"),
    "a list of lengths": refused(_length(b" 3, 4")),
    "a list of equal lengths": refused(_length(b" 3, 3")),
    "two lengths in one": refused(_length(b" 3 3")),
    "a negative length": refused(_length(b" -3")),
    "a signed length": refused(_length(b" +3")),
    "an empty length": refused(_length(b" ")),
    "a length in hexadecimal": refused(_length(b" 0x3")),
    "a length with an underscore": refused(_length(b" 1_0")),
    "a length with a fraction": refused(_length(b" 3.0")),
    "a length with an exponent": refused(_length(b" 3e0")),
    "a length with a parameter": refused(_length(b" 3;x")),
    "a length behind a vertical tab": refused(_length(b" \x0b3")),
    "a length behind a form feed": refused(_length(b"\x0c3")),
    "a length behind a no-break space": refused(_length(b" \xa03")),
    "a length in quotes": refused(_length(b' "3"')),
    "a length in full-width digits": refused(_length(" \uff13".encode())),
    "a length beyond 64 bits": refused(_length(b" 99999999999999999999")),
    "a length that wraps to 3 in 64 bits": refused(_length(b" 18446744073709551619")),
    "a folded length": refused(_length(b"\r\n 3")),
    "a space before a length's colon": refused(head(b"Content-Length : 3") + b"{ }"),
    "a tab before a length's colon": refused(head(b"Content-Length\t: 3") + b"{ }"),
    "a NUL in a length's name": refused(head(b"Content-\0Length: 3") + b"{ }"),
    "a length in the name of another header": refused(head(b"X: y\rContent-Length: 3") + b"{ }"),
    "a length with an underscore in its name": refused(head(b"Content_Length: 3") + b"{ }"),
    "a length beyond the limit on bodies": refused(head(b"Content-Length: 9999999999"), 413),
    "a length with leading zeros": served(_length(b" 0003"), post()),
    "a length between tabs": served(_length(b"\t3\t"), post()),
    "a length of zero": served(head(b"Content-Length: 0", method=b"GET"), get()),
    "a body with GET": served(
        head(b"Content-Length: 3", method=b"GET") + b"{ }",
        Got(method="GET", target=READ.decode(), body=b"{ }"),
    ),
    "no length at all": served(head(method=b"GET"), get()),
}

CODINGS: dict[str, Case] = {
    "a length, then chunks": refused(_coding(b"Content-Length: 5", b"Transfer-Encoding: chunked")),
    "chunks, then a length": refused(_coding(b"Transfer-Encoding: chunked", b"Content-Length: 5")),
    "chunks and a length of zero": refused(_coding(b"Transfer-Encoding: chunked", b"Content-Length: 0")),
    "another coding and a length": refused(_coding(b"Transfer-Encoding: identity", b"Content-Length: 3")),
    "chunked twice": refused(_coding(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked")),
    "chunked twice in one line": refused(_coding(b"Transfer-Encoding: chunked, chunked")),
    "chunked, then identity": refused(_coding(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity")),
    "identity, then chunked": refused(
        _coding(b"Transfer-Encoding: identity", b"Transfer-Encoding: chunked"), 501
    ),
    "chunked before another coding": refused(_coding(b"Transfer-Encoding: chunked, gzip")),
    "a coding before chunked": refused(_coding(b"Transfer-Encoding: gzip, chunked"), 501),
    "identity alone": refused(_coding(b"Transfer-Encoding: identity"), 501),
    "an unknown coding": refused(_coding(b"Transfer-Encoding: xchunked"), 501),
    "an empty coding": refused(_coding(b"Transfer-Encoding:")),
    "chunked and a comma": refused(_coding(b"Transfer-Encoding: chunked,")),
    "a comma and chunked": refused(_coding(b"Transfer-Encoding: ,chunked"), 501),
    "chunked with a parameter": refused(_coding(b"Transfer-Encoding: chunked;q=1"), 501),
    "chunked in quotes": refused(_coding(b'Transfer-Encoding: "chunked"'), 501),
    "chunked behind a vertical tab": refused(_coding(b"Transfer-Encoding: \x0bchunked")),
    "chunked before a NUL": refused(_coding(b"Transfer-Encoding: chunked\0")),
    "chunked behind a no-break space": refused(_coding(b"Transfer-Encoding: \xa0chunked"), 501),
    "chunked before a bare CR": refused(_coding(b"Transfer-Encoding: chunked\r")),
    "chunked behind a bare LF": refused(_coding(b"X: y\nTransfer-Encoding: chunked")),
    "a folded coding": refused(_coding(b"Transfer-Encoding:\r\n chunked")),
    "a coding continued in a folded line": refused(_coding(b"Transfer-Encoding: chunked\r\n , identity")),
    "a space before a coding's colon": refused(_coding(b"Transfer-Encoding : chunked")),
    "a space before a coding's name": refused(_coding(b" Transfer-Encoding: chunked", b"Content-Length: 3")),
    "a coding with an underscore in its name": refused(_coding(b"Transfer_Encoding: chunked")),
    "chunks in HTTP/1.0": refused(head(b"Transfer-Encoding: chunked", version=b"1.0") + _END),
    "chunked in capitals": served(_coding(b"TRANSFER-ENCODING: CHUNKED"), post()),
    "chunked between spaces": served(_coding(b"Transfer-Encoding:   chunked  "), post()),
    "chunked behind a tab": served(_coding(b"Transfer-Encoding:\tchunked"), post()),
    # RFC 9110 §5.5 would strip it; llhttp refuses, and that is safe as well.
    "chunked before a tab": refused(_coding(b"Transfer-Encoding: chunked\t")),
    "chunks with GET": served(head(b"Transfer-Encoding: chunked", method=b"GET") + _END, get()),
}


def _chunks(data: bytes) -> bytes:
    return CHUNKED + data


CHUNKS: dict[str, Case] = {
    "a chunk size that is no number": refused(_chunks(b"zz\r\n{ }\r\n" + _END)),
    "a chunk size with 0x": refused(_chunks(b"0x3\r\n{ }\r\n" + _END)),
    "a chunk size with a plus": refused(_chunks(b"+3\r\n{ }\r\n" + _END)),
    "a negative chunk size": refused(_chunks(b"-3\r\n{ }\r\n" + _END)),
    "a chunk size with an underscore": refused(_chunks(b"1_0\r\n0123456789{ }def\r\n" + _END)),
    "an empty chunk size": refused(_chunks(b"\r\n{ }\r\n" + _END)),
    "a chunk size that is an extension alone": refused(_chunks(b";a\r\n{ }\r\n" + _END)),
    "a chunk size beyond 64 bits": refused(_chunks(b"fffffffffffffffff\r\n{ }\r\n")),
    "a chunk size that wraps to 3 in 64 bits": refused(_chunks(b"10000000000000003\r\n{ }\r\n" + _END)),
    "a space behind a chunk size": refused(_chunks(b"3 \r\n{ }\r\n" + _END)),
    "a space before a chunk size": refused(_chunks(b" 3\r\n{ }\r\n" + _END)),
    "a tab behind a chunk size": refused(_chunks(b"3\t\r\n{ }\r\n" + _END)),
    "a space before a chunk extension": refused(_chunks(b"3 ;a=b\r\n{ }\r\n" + _END)),
    "a chunk size before a bare LF": refused(_chunks(b"3\n{ }\r\n" + _END)),
    "a chunk size before a bare CR": refused(_chunks(b"3\r{ }\r\n" + _END)),
    "a chunk before a bare LF": refused(_chunks(b"3\r\n{ }\n" + _END)),
    "a chunk without its CRLF": refused(_chunks(b"3\r\n{ }" + _END)),
    "a chunk with two bytes for its CRLF": refused(_chunks(b"3\r\n{ }XX" + _END)),
    "a chunk that is longer than it says": refused(_chunks(b"3\r\n{ }def\r\n" + _END)),
    "a chunk that is shorter than it says": refused(_chunks(b"4\r\n{ }\r\n" + _END)),
    "a bare LF in a chunk extension": refused(_chunks(b"3;a\nb\r\n{ }\r\n" + _END)),
    "a bare CR in a chunk extension": refused(_chunks(b"3;a\rb\r\n{ }\r\n" + _END)),
    "a NUL in a chunk extension": refused(_chunks(b"3;a\0b\r\n{ }\r\n" + _END)),
    "a line break in a quoted chunk extension": refused(_chunks(b'3;a="\r\n"\r\n{ }\r\n' + _END)),
    "a last chunk before a bare LF": refused(_chunks(b"0\r\n\n")),
    "a last chunk before a bare CR": refused(_chunks(b"0\r\n\rX")),
    "something behind the last chunk": refused(_chunks(b"0\r\n{ }")),
    "a request line in the place of trailers": refused(_chunks(b"0\r\nGET /v1/x HTTP/1.1\r\n\r\n")),
    "a trailer with a length": refused(_chunks(b"3\r\n{ }\r\n0\r\nContent-Length: 5\r\n\r\n")),
    "a trailer with a coding": refused(_chunks(b"3\r\n{ }\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n")),
    "a folded trailer": refused(_chunks(b"3\r\n{ }\r\n0\r\nA: b\r\n c\r\n\r\n")),
    "a trailer before a bare LF": refused(_chunks(b"3\r\n{ }\r\n0\r\nA: b\n\r\n")),
    "a trailer without a colon": refused(_chunks(b"3\r\n{ }\r\n0\r\nAb\r\n\r\n")),
    "trailers without end": refused(_chunks(b"0\r\n" + b"a: b\r\n" * 20_000), 431),
    "chunk extensions without end": refused(_chunks(b"1;" + b"a" * 3_000_000)),
    "tiny chunks with long extensions": refused(_chunks((b"1;" + b"a" * 200 + b"\r\nx\r\n") * 10_000)),
    "chunks": served(_chunks(b"1\r\n{\r\n2\r\n }\r\n" + _END), post()),
    "chunk sizes in capitals": served(_chunks(b"A\r\n{        }\r\n" + _END), post(b"{        }")),
    "a chunk size with leading zeros": served(_chunks(b"0000000003\r\n{ }\r\n" + _END), post()),
    "a last chunk of many zeros": served(_chunks(b"3\r\n{ }\r\n0000\r\n\r\n"), post()),
    "chunk extensions": served(_chunks(b'3;a=b;c="d;e"\r\n{ }\r\n0;z\r\n\r\n'), post()),
    "a trailer": served(_chunks(b"3\r\n{ }\r\n0\r\nX-Sum: 1\r\n\r\n"), post()),
    # Trailers are dropped, so those that would matter in a head can't.
    "a trailer that would be a Host": served(_chunks(b"3\r\n{ }\r\n0\r\nHost: evil\r\n\r\n"), post()),
    "a trailer that would be a key": served(
        _chunks(b"3\r\n{ }\r\n0\r\nAuthorization: Bearer x\r\n\r\n"), post()
    ),
    "five thousand tiny chunks": served(
        _chunks(b"1\r\n{\r\n" + b"1\r\n \r\n" * 5000 + b"1\r\n}\r\n" + _END),
        post(b"{" + b" " * 5000 + b"}"),
    ),
}

FRAMING = {**LENGTHS, **CODINGS, **CHUNKS}
