"""Request targets: what is checked must be what is forwarded (RFC 9112 §3.2, RFC 3986 §6)."""

from __future__ import annotations

from .case import Case, get, head, refused, served


def _to(target: bytes) -> bytes:
    return head(method=b"GET", target=target)


TARGETS: dict[str, Case] = {
    "a target that is no path": refused(_to(b"../x")),
    "an authority": refused(_to(b"a:80")),
    "a star for GET": refused(_to(b"*")),
    "an absolute target without a host": refused(_to(b"http:///version")),
    "an absolute target with a user": refused(_to(b"http://u@x/version")),
    "an absolute target with two users": refused(_to(b"http://u@v@x/version")),
    "another scheme": refused(_to(b"ftp://x/version")),
    "a file": refused(_to(b"file:///etc/passwd")),
    "a fragment": refused(_to(b"/version#a")),
    "a fragment behind a query": refused(_to(b"/version?a#b")),
    "a fragment before a path": refused(_to(b"http://x#/version")),
    "a control character": refused(_to(b"/\x01")),
    "a NUL": refused(_to(b"/\0")),
    "a DEL": refused(_to(b"/v1/\x7f")),
    "bytes beyond ASCII in a path": refused(_to("/v1/é".encode())),
    "bytes beyond ASCII in a query": refused(_to("/version?é".encode())),
    "an escaped NUL": refused(_to(b"/v1/%00")),
    "an escaped line break": refused(_to(b"/v1/%0d%0aX:y")),
    "an escaped C1 control": refused(_to(b"/v1/%c2%85")),
    "escapes that are no UTF-8": refused(_to(b"/v1/%ff%fe")),
    "an overlong escape of a slash": refused(_to(b"/v1/..%c0%af..")),
    "an escaped surrogate": refused(_to(b"/v1/%ed%a0%80")),
    "a broken escape": refused(_to(b"/v1/%zz")),
    "half an escape": refused(_to(b"/v1/a%4")),
    "an escape of Microsoft's": refused(_to(b"/v1/%u002e")),
    "an escaped letter": refused(_to(b"/v%65rsion")),
    "an escaped digit": refused(_to(b"/v%31/models")),
    "an escape escaped": refused(_to(b"/v%2565rsion")),
    "an escaped percent sign": refused(_to(b"/v1/100%25")),
    "dots up": refused(_to(b"/v1/../metrics")),
    "dots up at the end": refused(_to(b"/v1/..")),
    "a dot": refused(_to(b"/v1/./models")),
    "escaped dots": refused(_to(b"/v1/%2e%2e/metrics")),
    "half-escaped dots": refused(_to(b"/v1/.%2E/metrics")),
    "dots behind an escaped slash": refused(_to(b"/v1/..%2fmetrics")),
    "dots with a parameter": refused(_to(b"/v1/..;a=b/metrics")),
    "a backslash": refused(_to(b"/v1\\models")),
    "an escaped backslash": refused(_to(b"/v1/..%5cmetrics")),
    "two slashes at the start": refused(_to(b"//x/version")),
    "two slashes": refused(_to(b"/v1//models")),
    "a slash and an escaped slash": refused(_to(b"/v1/%2fmodels")),
    "an absolute target": served(_to(b"http://evil:80/version?a=b"), get("/version?a=b")),
    "an absolute target in capitals": served(_to(b"HTTPS://evil/version"), get()),
    "a query that looks like a URL": served(
        _to(b"/version?u=http://x/../y//z"), get("/version?u=http://x/../y//z")
    ),
    "an escaped query": served(_to(b"/version?a=%2e%2e%00%zz"), get("/version?a=%2e%2e%00%zz")),
    "an empty query": served(_to(b"/version?"), get("/version?")),
    "a name with a space and an umlaut": served(_to(b"/v1/a%20%C3%BC"), get("/v1/a%20%C3%BC"), routed=False),
    "a model's name with an escaped slash": served(
        _to(b"/v1/x/org%2Fname"), get("/v1/x/org%2Fname"), routed=False
    ),
    "dots in a name": served(_to(b"/v1/a..b/.c"), get("/v1/a..b/.c"), routed=False),
}
