"""What a stream's request asks the engine for, and what the router asks for on top.

The engine is to name the tokens of its answer, so that another one can go on with it, and to count them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

Fields = dict[str, Any]
"""The members of a request's body; their values are decoded, or msgspec.Raw."""

ADDED = {"return_token_ids": True, "stream_options": {"include_usage": True}}
ADDED_BYTES = msgspec.json.encode(ADDED)[1:-1]
ABOUT = frozenset({"return_token_ids", "stream_options", "tools", "echo"})
"""Members that change what is added."""

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_decode = msgspec.json.Decoder().decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the client asked of its stream, and what is `added` to that."""

    wants_ids: bool = True
    """The client asked for the tokens' ids itself."""
    wants_usage: bool = True
    """The client asked for the usage at the end."""
    added: Mapping[str, Any] = field(default_factory=dict)


USUAL = Asked(wants_ids=False, wants_usage=False, added=ADDED)


def fields(body: bytes) -> Fields:
    """The members of a JSON object, their values raw. Raises msgspec.DecodeError, UnicodeDecodeError."""
    found: Fields = _fields.decode(body)
    return found


def value(given: Fields, name: str) -> Any:
    """One member, decoded; None when it is not there. Raises msgspec.DecodeError."""
    found = given.get(name)
    return _decode(found) if isinstance(found, msgspec.Raw) else found


def ask(given: Fields) -> Asked:
    """What to add to a stream's request so that the engine names and counts its tokens."""
    if ABOUT.isdisjoint(given):
        return USUAL
    added: dict[str, Any] = {}
    wants_ids = value(given, "return_token_ids") is True
    options = value(given, "stream_options")
    # vLLM leaves an echoed prompt out of the text where it names tokens; a client's own `false` stands;
    # and with tools it writes empty events for what its parser holds back.
    if "return_token_ids" not in given and "tools" not in given and not value(given, "echo"):
        added["return_token_ids"] = True
    if options is None:
        added["stream_options"] = {"include_usage": True}
    elif isinstance(options, dict) and not options.get("include_usage"):
        added["stream_options"] = {**options, "include_usage": True, "continuous_usage_stats": False}
    wants_usage = "stream_options" not in added
    return Asked(wants_ids=wants_ids, wants_usage=wants_usage, added=added)


def count(given: Fields) -> Asked:
    """What to add to a stream's request so that the engine counts its tokens, and no more."""
    options = value(given, "stream_options")
    if not isinstance(options, dict | None) or (options or {}).get("include_usage"):
        return Asked()
    # TensorRT-LLM would count in each event.
    added = {**(options or {}), "include_usage": True, "continuous_usage_stats": False}
    return Asked(wants_usage=False, added={"stream_options": added})


def splice(body: bytes, given: Fields, added: Mapping[str, Any]) -> bytes:
    """`body` with more members. What is new goes behind the first brace, so that a large body is copied but
    not encoded; members the client has as well are replaced."""
    if not added:
        return body
    if any(name in given for name in added):
        return msgspec.json.encode({**given, **added})
    text = ADDED_BYTES if added is ADDED else msgspec.json.encode(added)[1:-1]
    brace = body.index(b"{") + 1
    return b"".join((body[:brace], text, b"," if given else b"", memoryview(body)[brace:]))
