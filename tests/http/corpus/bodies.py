"""JSON that two parsers may read differently, on a route whose body the router reads."""

from __future__ import annotations

import json

from .case import Case, head, post, served

_PATH = "/v1/completions"


def _of(body: bytes, *lines: bytes) -> bytes:
    return (
        head(
            b"Content-Type: application/json",
            b"Content-Length: %d" % len(body),
            *lines,
            target=_PATH.encode(),
        )
        + body
    )


def _bad(body: bytes, status: int = 400) -> Case:
    """Refused by the route, after the whole request was read: the connection goes on."""
    return Case(data=_of(body), status=status, goes_on=True)


def _good(body: bytes) -> Case:
    return served(_of(body), post(body, _PATH))


def _with(more: bytes) -> bytes:
    return b'{"model":"toy","prompt":"x","max_tokens":1' + more + b"}"


_PLAIN = _with(b"")

BODIES: dict[str, Case] = {
    "no body": _bad(b""),
    "white space": _bad(b" \r\n"),
    "a list": _bad(b"[]"),
    "a string": _bad(b'"x"'),
    "half an object": _bad(_PLAIN[:-1]),
    "an object and a comma": _bad(_PLAIN + b","),
    "an object and another": _bad(_PLAIN + _PLAIN),
    "an object and a NUL": _bad(_PLAIN + b"\0"),
    "a trailing comma": _bad(_with(b",")),
    "a comment": _bad(_with(b"/*x*/")),
    "single quotes": _bad(_PLAIN.replace(b'"', b"'")),
    "NaN": _bad(_with(b',"a":NaN')),
    "minus infinity": _bad(_with(b',"a":-Infinity')),
    "a leading zero": _bad(_with(b',"a":01')),
    "a leading plus": _bad(_with(b',"a":+1')),
    "a hexadecimal number": _bad(_with(b',"a":0x1')),
    "a control character in a string": _bad(_with(b',"a":"\x01"')),
    "a line break in a string": _bad(_with(b',"a":"b\nc"')),
    "an unknown escape": _bad(_with(b',"a":"\\x41"')),
    "a lone surrogate": _bad(_with(b',"a":"\\ud800"')),
    "a lone surrogate in a key": _bad(_with(b',"\\ud800":1')),
    "a surrogate the wrong way round": _bad(_with(b',"a":"\\udc00\\ud800"')),
    "invalid UTF-8": _bad(_with(b',"a":"\xff"')),
    "an overlong slash": _bad(_with(b',"a":"\xc0\xaf"')),
    "a surrogate in UTF-8": _bad(_with(b',"a":"\xed\xa0\x80"')),
    "invalid UTF-8 in a key": _bad(_with(b',"\xff":1')),
    "a byte order mark": _bad(b"\xef\xbb\xbf" + _PLAIN),
    "UTF-16": _bad(_PLAIN.decode().encode("utf-16")),
    "UTF-16 without a mark": _bad(_PLAIN.decode().encode("utf-16-le")),
    "UTF-32": _bad(_PLAIN.decode().encode("utf-32")),
    "deep lists": _bad(_with(b',"a":' + b"[" * 100_000 + b"]" * 100_000)),
    "deep lists without end": _bad(_with(b',"a":' + b"[" * 100_000)),
    "deep objects": _bad(_with(b',"a":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000)),
    "a compressed body": Case(data=_of(_PLAIN, b"Content-Encoding: gzip"), status=415, goes_on=True),
    "a model that is not served": _bad(_PLAIN.replace(b"toy", b"other"), 404),
    # All parsers at hand take the last of equal keys; so must the router's view of them.
    "a model twice, a good one last": _good(_PLAIN.replace(b'"toy"', b'"other","model":"toy"')),
    "a model twice, a bad one last": _bad(_PLAIN.replace(b'"toy"', b'"toy","model":"other"'), 404),
    "a model twice, escaped": _bad(_PLAIN.replace(b'"toy"', b'"toy","mod\\u0065l":"other"'), 404),
    "a model in another case": _good(_with(b',"Model":"other"')),
    "stream twice, off last": _good(_with(b',"stream":true,"stream":false')),
    "max_tokens twice": _good(_with(b',"max_tokens":2')),
    "spaces everywhere": _good(json.dumps(json.loads(_PLAIN), indent=8).encode()),
    "all escapes": _good(_with(b',"a":"\\" \\\\ \\/ \\b \\f \\n \\r \\t \\u00e9 \\ud83d\\ude00"')),
    "characters beyond ASCII": _good(_with(',"a":"é 漢 😀"'.encode())),
    "a NUL in a string": _good(_with(b',"a":"\\u0000"')),
    "a big number": _good(_with(b',"a":123456789012345678901234567890')),
    "a number of Python's dunder": _good(_with(b',"__proto__":{"a":1},"__class__":"x"')),
    "many keys": _good(_with(b"".join(b',"k%d":%d' % (i, i) for i in range(5000)))),
    "a long prompt": _good(_with(b"").replace(b'"x"', b'"' + b"word " * 15_000 + b'"')),
}
