"""The endpoint's routes: what is answered here, what goes to an engine, and nothing else.

Paths are listed one by one, because engines also have routes that end, change or reveal them to whoever
may ask (`/sleep`, `/collective_rpc`, `/v1/load_lora_adapter`, …), some of them under `/v1/`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["own", "generate", "forward", "held", "batch"]
"""`own`: answered here. `generate`: text from a prompt. `forward`: any other question to one worker.
`held`: about something that one worker keeps. `batch`: for the process that carries batches out."""
Style = Literal["openai", "anthropic"]
"""Whose form errors have."""

_GET = frozenset({"GET", "HEAD"})
_POST = frozenset({"POST"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One route. `path` is also its name in metrics."""

    path: str
    kind: Kind
    methods: frozenset[str] = _POST
    body: Literal["none", "json", "multipart"] = "json"
    disaggregated: Literal["two_legs", "decode", "never"] = "decode"
    """What happens to it on prefill and decode workers: both legs, the decode worker alone, or a 404."""
    style: Style = "openai"

    @property
    def computes_prompt(self) -> bool:
        """On a decode worker alone it costs that worker a whole prefill."""
        return self.kind == "generate" or self.body == "multipart"

    @property
    def costs(self) -> bool:
        """It computes something on a GPU."""
        return self.computes_prompt or self.disaggregated == "never"


def _own(path: str) -> Route:
    return Route(path=path, kind="own", methods=_GET, body="none")


def _generate(path: str, **more: object) -> Route:
    return Route(path=path, kind="generate", **more)  # type: ignore[arg-type]


def _forward(path: str, **more: object) -> Route:
    return Route(path=path, kind="forward", **more)  # type: ignore[arg-type]


HEALTH, METRICS, MODELS = _own("/health"), _own("/metrics"), _own("/v1/models")
MODEL = _own("/v1/models/{model}")
DECISIONS = _own("/v1/hpcserve/decisions")
CHAT = _generate("/v1/chat/completions", disaggregated="two_legs")
COMPLETIONS = _generate("/v1/completions", disaggregated="two_legs")
RESPONSES = _generate("/v1/responses")
MESSAGES = _generate("/v1/messages", style="anthropic")
RESPONSE = Route(path="/v1/responses/{id}", kind="held", methods=_GET, body="none")
CANCEL = Route(path="/v1/responses/{id}/cancel", kind="held", body="none")
_BATCH_METHODS = {
    "/v1/files": {"GET", "HEAD", "POST"},
    "/v1/files/{id}": {"GET", "HEAD", "DELETE"},
    "/v1/files/{id}/content": _GET,
    "/v1/batches": {"GET", "HEAD", "POST"},
    "/v1/batches/{id}": _GET,
    "/v1/batches/{id}/cancel": _POST,
}
BATCHES = {
    path: Route(path=path, kind="batch", methods=frozenset(methods), body="none")
    for path, methods in _BATCH_METHODS.items()
}
UNKNOWN = Route(path="other", kind="own", methods=frozenset(), body="none")
"""In metrics, all paths that are no route: clients can't grow the label set."""

# Pooling models have no decode, so there are no prefill and decode replicas of them.
_POOLING = (
    "/v1/embeddings", "/v2/embed", "/v1/rerank", "/rerank", "/v2/rerank", "/score", "/v1/score", "/classify",
    "/v1/classify", "/pooling", "/v1/pooling", "/generative_scoring",
)  # fmt: skip
_ROUTES = (
    HEALTH, METRICS, MODELS, DECISIONS, CHAT, COMPLETIONS, RESPONSES, MESSAGES,
    _generate("/v1/chat/completions/batch"),
    _forward("/v1/messages/count_tokens", style="anthropic"),
    *(_forward(path, disaggregated="never") for path in _POOLING),
    _forward("/tokenize"),
    _forward("/detokenize"),
    _forward("/v1/audio/transcriptions", body="multipart"),
    _forward("/v1/audio/translations", body="multipart"),
    _forward("/v1/audio/speech"),
    _forward("/v1/images/generations"),
    _forward("/v1/images/edits", body="multipart"),
    _forward("/version", methods=_GET, body="none"),
    *(
        _forward(path)
        for path in (
            "/v1/chat/completions/render", "/v1/completions/render", "/v1/responses/render",
            "/v1/chat/completions/derender", "/v1/completions/derender",
        )
    ),
    _forward("/v1/messages/render", style="anthropic"),
)  # fmt: skip

_BY_PATH = {route.path: route for route in _ROUTES}
HELD_ID = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]{0,199}")
_HELD = re.compile(rf"/v1/responses/({HELD_ID.pattern})(/cancel)?")
_BATCH = re.compile(r"(/v1/files|/v1/batches)(?:(/)[A-Za-z0-9_\-]{1,100}(/[a-z]+)?)?")
_MODEL = re.compile(r"/v1/models/([A-Za-z0-9_.\-/:]{1,300})")


def find(path: str) -> Route | None:
    """The route of a path, compared as it is: no decoding, no trailing slash."""
    route = _BY_PATH.get(path)
    if route is not None:
        return route
    held = _HELD.fullmatch(path)
    if held is not None:
        return CANCEL if held[2] else RESPONSE
    batch = _BATCH.fullmatch(path)
    if batch is not None:
        return BATCHES.get(batch[1] + (f"/{{id}}{batch[3] or ''}" if batch[2] else ""))
    return MODEL if _MODEL.fullmatch(path) else None


def style(path: str) -> Style:
    """Whose form an error has, also where the path is no route."""
    return "anthropic" if path.startswith("/v1/messages") else "openai"


def held_id(path: str) -> str:
    """The `{id}` of RESPONSE and CANCEL."""
    return path.split("/")[3]


def model_id(path: str) -> str:
    """The `{model}` of MODEL."""
    return path.removeprefix("/v1/models/")
