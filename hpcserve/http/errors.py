"""What can go wrong in an exchange, and how it looks on the wire."""

from __future__ import annotations

from typing import Literal

import msgspec

Header = tuple[bytes, bytes]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}


class HttpError(Exception):
    """A request that is answered with `status` and a JSON error of OpenAI's shape."""

    def __init__(
        self, status: int, message: str, *, headers: tuple[Header, ...] = (), code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers
        self.code = code

    def body(self) -> bytes:
        return error_body(self.status, self.message, code=self.code)

    def last_words(self) -> bytes:
        """The whole response, to input that is no request."""
        body = self.body()
        return (
            b"HTTP/1.1 %d Refused\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n%b" % (self.status, len(body), body)
        )


class ClientGone(Exception):
    """The client closed its connection before its request was read."""


UpstreamFault = Literal["connect", "reset", "protocol", "too-large"]


class UpstreamError(Exception):
    """The other side of a client connection failed.

    `fault` is `connect` (it never got the request), `reset` (it closed before its answer was whole),
    `protocol` (its answer is not HTTP) or `too-large`.
    """

    def __init__(self, fault: UpstreamFault, message: str) -> None:
        super().__init__(message)
        self.fault: UpstreamFault = fault
        self.message = message


def error_body(status: int, message: str, *, code: str | None = None) -> bytes:
    """`{"error": {"message", "type", "param", "code"}}`, as OpenAI's clients read it.

    `code` is the HTTP status unless a name for the failure is given; vLLM does the same.
    """
    kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": None, "code": code or status}
    return msgspec.json.encode({"error": error})
