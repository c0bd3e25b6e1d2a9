"""Errors as each API's clients read them, and plain answers that any of them may get."""

from __future__ import annotations

import msgspec

from ..http.errors import HttpError
from ..http.exchange import Exchange
from . import routes
from .call import id_headers
from .routes import Route

# https://docs.anthropic.com/en/api/errors
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def answer(exchange: Exchange, request_id: str, error: HttpError) -> None:
    """Answer with `error`; cuts the connection where an answer has begun."""
    if exchange.started:
        exchange.abort()
        return
    body = error.body()
    if routes.style(exchange.path) == "anthropic":
        kind = _ANTHROPIC.get(error.status) or (
            "invalid_request_error" if error.status < 500 else "api_error"
        )
        told = {"type": kind, "message": error.message}
        body = msgspec.json.encode({"type": "error", "error": told, "request_id": request_id})
    exchange.respond(error.status, body, headers=[*id_headers(exchange.path, request_id), *error.headers])


def check_method(exchange: Exchange, route: Route) -> None:
    """Raises HttpError 405 for a method that the route does not take."""
    if exchange.method not in route.methods:
        raise HttpError(
            405,
            f"{exchange.path} takes {' and '.join(sorted(route.methods))}",
            headers=((b"allow", allowed(route)),),
            code="method_not_allowed",
        )


def allowed(route: Route) -> bytes:
    """The value of `allow`."""
    return ", ".join(sorted({*route.methods, "OPTIONS"})).encode()
