"""A stub engine with the routes that the fake engine has not: responses, messages, sound, several models."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec

from hpcserve.http.server import Exchange

from ..stubs import Seen, Stub

Json = dict[str, Any]
JSON = msgspec.json.encode


class ApiEngine(Stub):
    """Speaks OpenAI's and Anthropic's APIs, and keeps the responses it wrote."""

    def __init__(self, name: str, role: str = "aggregated", *, models: tuple[str, ...] = ("toy",)) -> None:
        super().__init__(name, role)
        self.models = models
        """The first is the model, the others are adapters of it."""
        self.responses: dict[str, Json] = {}
        self._numbers = itertools.count()

    def asked(self, path: str) -> list[Seen]:
        """The requests for this path; the router asks for others of its own."""
        return [seen for seen in self.seen if seen.path == path]

    async def _handle(self, exchange: Exchange) -> None:
        raw = await exchange.body(1 << 30)
        form = (exchange.header(b"content-type") or b"").startswith(b"multipart/")
        body = None if form or not raw else msgspec.json.decode(raw)
        seen = Seen(exchange.path, exchange.method, exchange.headers, raw, body)
        self.seen.append(seen)
        if self.behave is not None and await self.behave(exchange, seen):
            return
        path = exchange.path
        if path == "/v1/models":
            exchange.respond(200, JSON({"object": "list", "data": self.cards()}))
        elif path.startswith("/v1/responses"):
            self._response(exchange, body)
        elif path == "/v1/messages":
            self._message(exchange, body)
        elif path == "/v1/messages/count_tokens":
            exchange.respond(200, JSON({"input_tokens": len(str(body["messages"]).split())}))
        elif path == "/v1/embeddings":
            data = [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]
            usage = {"prompt_tokens": 2, "total_tokens": 2}
            exchange.respond(
                200, JSON({"object": "list", "data": data, "model": body["model"], "usage": usage})
            )
        elif path.startswith("/v1/audio/"):
            exchange.respond(200, JSON({"text": f"{self.name} heard {len(raw)} bytes"}))
        else:
            await self._answer(exchange, body or {})

    def cards(self) -> list[Json]:
        base, *adapters = self.models
        cards: list[Json] = [
            {"id": base, "object": "model", "root": f"/models/{base}", "max_model_len": 4096}
        ]
        return cards + [{"id": name, "object": "model", "parent": base} for name in adapters]

    def _response(self, exchange: Exchange, body: Json | None) -> None:
        _, _, _, *rest = exchange.path.split("/")
        if not rest:
            assert body is not None
            number = f"resp_{self.name}_{next(self._numbers)}"
            before = body.get("previous_response_id")
            if before is not None and before not in self.responses:
                exchange.respond(404, JSON({"error": {"message": "no such response", "code": 404}}))
                return
            self.responses[number] = response(
                number, body, "queued" if body.get("background") else "completed"
            )
            if body.get("stream"):
                self._response_stream(exchange, self.responses[number])
                return
            exchange.respond(200, JSON(self.responses[number]))
            return
        found = self.responses.get(rest[0])
        if found is None:
            exchange.respond(404, JSON({"error": {"message": "no such response", "code": 404}}))
            return
        if rest[1:] == ["cancel"]:
            found["status"] = "cancelled"
        exchange.respond(200, JSON(found))

    def _response_stream(self, exchange: Exchange, found: Json) -> None:
        exchange.start(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
        events: list[Json] = [
            {"type": "response.created", "response": found},
            {"type": "response.output_text.delta", "delta": "hello", "item_id": "m", "output_index": 0,
             "content_index": 0, "logprobs": []},
            {"type": "response.completed", "response": found},
        ]  # fmt: skip
        for number, event in enumerate(events):
            data = JSON({**event, "sequence_number": number})
            exchange.write(b"event: %b\ndata: %b\n\n" % (str(event["type"]).encode(), data))
        exchange.finish()

    def _message(self, exchange: Exchange, body: Json) -> None:
        message: Json = {
            "id": "msg_1", "type": "message", "role": "assistant", "model": body["model"],
            "content": [{"type": "text", "text": f"hello from {self.name}"}], "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": 7, "output_tokens": 3, "cache_read_input_tokens": 4},
        }  # fmt: skip
        if not body.get("stream"):
            exchange.respond(200, JSON(message))
            return
        exchange.start(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
        events: list[Json] = [
            {"type": "message_start", "message": {**message, "content": [], "stop_reason": None}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hello"}},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None},
             "usage": {"output_tokens": 3}},
            {"type": "message_stop"},
        ]  # fmt: skip
        for event in events:
            exchange.write(b"event: %b\ndata: %b\n\n" % (str(event["type"]).encode(), JSON(event)))
        exchange.finish()


def response(number: str, body: Json, status: str) -> Json:
    text = {"type": "output_text", "text": "hello", "annotations": []}
    return {
        "id": number, "object": "response", "created_at": 1700000000, "status": status,
        "model": body.get("model", "toy"), "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
        "output": [{"type": "message", "id": "m", "role": "assistant", "status": status, "content": [text]}],
        "usage": {"input_tokens": 5, "output_tokens": 1, "total_tokens": 6,
                  "input_tokens_details": {"cached_tokens": 2},
                  "output_tokens_details": {"reasoning_tokens": 0}},
    }  # fmt: skip
