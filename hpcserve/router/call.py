"""One client request on its way through the router."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from ..http.bearer import bearer
from ..http.errors import Header, HttpError
from ..http.exchange import Exchange
from .routes import Route
from .why.explain import header as explained

if TYPE_CHECKING:
    from .placement.decision import Decision
    from .serving import Serving

Json = dict[str, Any]
Raw = dict[str, msgspec.Raw]

# RFC 9110 §7.6.1, plus what the router sets itself.
_HOP_BY_HOP = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection",
        b"te", b"trailer", b"transfer-encoding", b"upgrade", b"content-length", b"x-request-id",
        b"x-data-parallel-rank",
    }
)  # fmt: skip
# The client's key is for us alone. Engines answer uncompressed to the router: it must see where events end.
_REQUEST_ONLY = frozenset(
    {
        b"host", b"authorization", b"x-api-key", b"expect", b"accept-encoding", b"x-hpcserve-explain",
        b"x-hpcserve-priority", b"x-hpcserve-retries", b"x-hpcserve-on-behalf",
    }
)  # fmt: skip
_NOT_FOR_ENGINES = _HOP_BY_HOP | _REQUEST_ONLY
REQUEST_ID_HEADERS = (b"x-request-id", b"x-correlation-id", b"request-id", b"x-trace-id")
"""Where a client may have put its name for a request; the first that has one counts."""
_REQUEST_ID_HEADERS = frozenset(REQUEST_ID_HEADERS)
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,200}")

_RETRIES = re.compile(rb"[0-9]{1,3}")

_TRANSFERS = ("kv_transfer_params", "ec_transfer_params")
_TRANSFER_MEMBERS = frozenset({*_TRANSFERS, "vllm_xargs"})

_fields = msgspec.json.Decoder(Raw)
_decode = msgspec.json.Decoder().decode


class Ticket(Protocol):
    """What the admission is told about a request that it let in (`admission/admission.py`)."""

    def placed(self, uncached_tokens: int) -> None: ...
    def first_byte(self) -> None: ...


@dataclass(slots=True, kw_only=True)
class Call:
    """A request that was let in, its body read."""

    exchange: Exchange
    route: Route
    request_id: str
    arrived: float
    """Event loop time."""
    body: bytes
    fields: Raw | None
    """The body's members, their values as they came; None where the body is not JSON."""
    model: str
    """What the request names, else the served model."""
    streams: bool
    serving: Serving
    """The workers of that model."""
    job_key: str | None
    user: str = ""
    """Name of the key."""
    explains: bool = False
    """The client wants to see why its workers were chosen."""
    ticket: Ticket | None = None
    decisions: list[Decision] = field(default_factory=list)
    """All placements so far, the last one last."""
    retries: int = 0
    migrations: int = 0
    warnings: list[str] = field(default_factory=list)
    """Told to the client as `x-hpcserve-warning`, in the head of the response."""

    def placed(self, decision: Decision) -> None:
        """Workers were chosen, and are asked next."""
        self.decisions.append(decision)
        if self.ticket is not None:
            self.ticket.placed(decision.uncached_tokens)

    def attempts(self, most: int) -> int:
        """How many workers may be asked, one after the other: at `most`, or as few as the client wants.

        A client whose request may be what kills engines (a batch) decides itself when it tries again. Raises
        HttpError 400 for a header that is no number.
        """
        asked = self.exchange.header(b"x-hpcserve-retries")
        if asked is None:
            return most
        if not _RETRIES.fullmatch(asked):
            raise HttpError(400, "the header x-hpcserve-retries must be a whole number of up to three digits")
        return min(most, int(asked) + 1)

    def begin(self, headers: Iterable[Header] = ()) -> list[Header]:
        """The answer begins: headers for the client, an engine's less those of its connection, and ours."""
        if self.ticket is not None:
            self.ticket.first_byte()
        kept = for_client(headers)
        kept += id_headers(self.route.path, self.request_id)
        for warning in self.warnings:
            kept.append((b"x-hpcserve-warning", warning.encode("ascii", "replace")))
        if self.explains and self.decisions:
            kept.append((b"x-hpcserve-decision", explained(self)))
        return kept

    def engine_headers(self, *, request_id: str | None = None, encoded: bool = False) -> list[Header]:
        """Headers for an engine: the client's, less its key and what is between it and us.

        `encoded`: the body is our own JSON, not the client's bytes.
        """
        given = (request_id or self.request_id).encode("ascii")
        return for_engine(self.exchange.headers, given, self.job_key, encoded=encoded)


def for_client(headers: Iterable[Header]) -> list[Header]:
    """An engine's headers less those of its connection."""
    return _passed_on(headers, _HOP_BY_HOP)


def for_engine(
    headers: Iterable[Header], request_id: bytes, job_key: str | None, *, encoded: bool
) -> list[Header]:
    """See `Call.engine_headers()`."""
    kept = _passed_on(headers, _NOT_FOR_ENGINES)
    if encoded:
        kept = [header for header in kept if header[0] != b"content-type"]
        kept.append((b"content-type", b"application/json"))
    kept.append((b"x-request-id", request_id))
    kept += bearer(job_key)
    return kept


def _passed_on(headers: Iterable[Header], dropped: Collection[bytes]) -> list[Header]:
    """Less those of one connection, and those in `dropped`, which has `connection`."""
    kept: list[Header] = []
    options: set[bytes] = set()
    for header in headers:
        if header[0] not in dropped:
            kept.append(header)
        elif header[0] == b"connection":
            options.update([option.strip().lower() for option in header[1].split(b",")])
    return [header for header in kept if header[0] not in options] if options else kept


def request_id(exchange: Exchange) -> str:
    """The client's name for its request, or a new one where it has none that fits in a header and a log."""
    names = [name for name, _ in exchange.headers if name in _REQUEST_ID_HEADERS]
    if names:
        for name in REQUEST_ID_HEADERS:
            given = exchange.header(name) if name in names else None
            if given is not None and _REQUEST_ID.fullmatch(given):
                return given.decode("ascii")
    return os.urandom(16).hex()


def id_headers(path: str, request_id: str) -> list[Header]:
    """The request's id for the client. Anthropic's clients look for it under their own name."""
    value = request_id.encode("ascii")
    if path.startswith("/v1/messages"):
        return [(b"x-request-id", value), (b"request-id", value)]
    return [(b"x-request-id", value)]


def fields(exchange: Exchange, body: bytes) -> Raw:
    """The members of the JSON object in a request's body. Raises HttpError 400 or 415.

    The whole of it is checked to be JSON in UTF-8, and no value is made into objects.
    """
    encoding = exchange.header(b"content-encoding")
    if encoding is not None and encoding.lower() != b"identity":
        raise HttpError(415, "compressed request bodies are not understood; send plain JSON")
    return members(body)


def members(body: bytes) -> Raw:
    """`fields()` of a body that is not compressed."""
    try:
        if not body.isascii():
            # msgspec leaves out this check where it makes no string.
            body.decode()
        found: Raw = _fields.decode(body)
        for value in found.values():
            # A number out of range shows only when it is read; all other kinds of value are checked already.
            if len(value) < 400 and b"," < bytes(value) < b":":
                _decode(value)
    except RecursionError:
        raise too_deep() from None
    except UnicodeDecodeError:
        raise HttpError(400, "the request body is not valid UTF-8") from None
    except msgspec.ValidationError:
        raise HttpError(400, "the request body must be a JSON object") from None
    except msgspec.DecodeError as error:
        raise HttpError(400, f"the request body is not valid JSON: {error}") from None
    return found


def value(given: Raw | None, name: str) -> Any:
    """One member, decoded; None when it is not there. Raises HttpError 400."""
    raw = None if given is None else given.get(name)
    if raw is None:
        return None
    try:
        return _decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise HttpError(400, f"{name!r} in the request body is not valid: {error}") from None


def refuse_transfers(given: Raw | None, members: Collection[str] = ()) -> None:
    """Raises HttpError 400 for a body that says itself where KV blocks are: an engine connects to whatever
    address it is given there, and vLLM 0.32's engine core dies of a value that is no object. `members` are
    the engine's own names for that.

    vLLM hands the members of `vllm_xargs` to its connectors like its own.
    """
    if given is None:
        return
    for name in members:
        if value(given, name) is not None:
            raise HttpError(400, f"`{name}` is set by the router; leave it out")
    if _TRANSFER_MEMBERS.isdisjoint(given):
        return
    extra = value(given, "vllm_xargs")
    for name in _TRANSFERS:
        if value(given, name) is not None:
            raise HttpError(400, f"`{name}` is set by the router; leave it out")
        if isinstance(extra, dict) and name in extra:
            raise HttpError(400, f"`{name}` is set by the router; leave it out of `vllm_xargs`")


def too_deep() -> HttpError:
    return HttpError(400, "the JSON in the request body is nested too deeply")
