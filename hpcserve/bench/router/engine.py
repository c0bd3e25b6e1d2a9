"""`python -m hpcserve.bench.router.engine`: a mock engine that writes a chunk every few milliseconds.

It speaks as much of vLLM's API as routers ask for: chat and text completions as streams and whole,
`return_token_ids`, `stream_options.include_usage`, and NIXL's two legs. To a request with a room its streams
are in SGLang's form. It prints its port, then serves.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from functools import lru_cache
from typing import Any

import msgspec
import uvloop

from ...http.exchange import Exchange
from ...http.server import serve
from .peers import MODEL

_WORDS_PER_TOKEN = 0.75
_COMMON = '"created":1700000000,"model":"mock"'
_JSON = b"application/json"


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Transfer(msgspec.Struct):
    do_remote_decode: bool = False


class _Request(msgspec.Struct):
    prompt: msgspec.Raw = msgspec.Raw(b"")
    messages: msgspec.Raw = msgspec.Raw(b"")
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    return_token_ids: bool = False
    kv_transfer_params: _Transfer | None = None
    bootstrap_room: int | None = None


_decoder = msgspec.json.Decoder(_Request)


class Engine:
    """Answers with `max_tokens` tokens, one chunk each, `gap` seconds apart."""

    def __init__(self, gap: float) -> None:
        self._gap = gap

    async def handle(self, exchange: Exchange) -> None:
        path = exchange.path
        if path in ("/v1/chat/completions", "/v1/completions"):
            await self._generate(exchange, chat=path == "/v1/chat/completions")
        elif path == "/v1/models":
            model = {
                "id": MODEL,
                "object": "model",
                "created": 0,
                "owned_by": "mock",
                "max_model_len": 131072,
            }
            exchange.respond(200, msgspec.json.encode({"object": "list", "data": [model]}))
        elif path in ("/get_server_info", "/server_info", "/get_model_info", "/model_info"):
            exchange.respond(200, msgspec.json.encode({"model_path": MODEL, "served_model_name": MODEL}))
        elif path == "/metrics":
            exchange.respond(200, b'vllm:num_requests_running{engine="0"} 0.0\n', b"text/plain")
        else:
            exchange.respond(200, b"{}")

    async def _generate(self, exchange: Exchange, *, chat: bool) -> None:
        body = await exchange.body(1 << 30)
        request = _decoder.decode(body)
        tokens = request.max_completion_tokens or request.max_tokens or 16
        transfer = request.kv_transfer_params
        prompt_tokens = max(1, len(body) // 6)
        if transfer is not None and transfer.do_remote_decode:
            exchange.respond(200, _prefilled(prompt_tokens))
            return
        usage = (
            f'{{"prompt_tokens":{prompt_tokens},"total_tokens":{prompt_tokens + tokens},'
            f'"completion_tokens":{tokens}}}'
        )
        if not request.stream:
            message = '"message":{"role":"assistant","content":"hello"}' if chat else '"text":"hello"'
            kind = "chat.completion" if chat else "text_completion"
            exchange.respond(
                200,
                f'{{"id":"cmpl-0","object":"{kind}",{_COMMON},"choices":[{{"index":0,{message},'
                f'"logprobs":null,"finish_reason":"length"}}],"usage":{usage}}}'.encode(),
            )
            return
        await self._stream(exchange, request, chat, tokens, prompt_tokens, usage)

    async def _stream(
        self, exchange: Exchange, request: _Request, chat: bool, tokens: int, prompt_tokens: int, usage: str
    ) -> None:
        ids = request.return_token_ids
        first, middle, last = _chunks(chat, prompt_tokens if ids else 0, request.bootstrap_room is not None)
        tail = b""
        if request.stream_options is not None and request.stream_options.include_usage:
            kind = "chat.completion.chunk" if chat else "text_completion"
            tail = (
                f'data: {{"id":"cmpl-0","object":"{kind}",{_COMMON},"choices":[],"usage":{usage}}}\n\n'
            ).encode()
        exchange.start(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
        for number in range(tokens):
            chunk = (first if number == 0 else b"") + (last if number == tokens - 1 else middle)
            if number == tokens - 1:
                chunk += tail + b"data: [DONE]\n\n"
            exchange.write(chunk)
            if number < tokens - 1:
                await asyncio.sleep(self._gap)
        exchange.finish()


@lru_cache(maxsize=64)
def _chunks(chat: bool, ids: int, sglang: bool) -> tuple[bytes, bytes, bytes]:
    """The role chunk that opens a chat, a chunk of one token, and the last one: vLLM's form, or SGLang's.

    With the ids of tokens, so many of the prompt, unless `ids` is 0. Kept, as routers share the machine.
    """
    kind = "chat.completion.chunk" if chat else "text_completion"
    head = f'data: {{"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"{kind}",{_COMMON},'
    prompt = f',"prompt_token_ids":[{"128000," * (ids - 1)}128000],"prompt_text":null' if ids else ""
    token = ',"token_ids":[1917]' if ids else ""
    opening = ""
    if sglang:
        opening, token = '"reasoning_content":null,', f',"matched_stop":null{token}'

    def one(delta: str, finish: str) -> bytes:
        text = f'"delta":{{{opening}"content":"{delta}"}}' if chat else f'"text":"{delta}"'
        return (
            f'{head}"choices":[{{"index":0,{text},"logprobs":null,"finish_reason":{finish}{token}}}]}}\n\n'
        ).encode()

    if chat:
        role = f'"delta":{{{opening}"role":"assistant","content":""}},"logprobs":null,"finish_reason":null'
        first = f'{head}"choices":[{{"index":0,{role}}}]{prompt}}}\n\n'.encode()
    else:
        first = b""
    return first, one(" hello", "null"), one(" hello", '"length"')


def _prefilled(prompt_tokens: int) -> bytes:
    blocks = list(range((prompt_tokens + 15) // 16))
    params: dict[str, Any] = {
        "do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [blocks],
        "remote_engine_id": "engine-0", "remote_request_id": "cmpl-0", "remote_host": "127.0.0.1",
        "remote_port": 5600, "tp_size": 1,
    }  # fmt: skip
    message = {"role": "assistant", "content": " "}
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 1, "total_tokens": prompt_tokens + 1}
    return msgspec.json.encode(
        {
            "id": "cmpl-0", "object": "text_completion", "created": 1700000000, "model": MODEL,
            "choices": [{"index": 0, "text": " ", "message": message, "finish_reason": "length"}],
            "kv_transfer_params": params, "usage": usage,
        }
    )  # fmt: skip


async def _serve(gap: float) -> None:
    server = await serve(Engine(gap).handle, cancel_on_disconnect=True)
    print(server.port, flush=True)
    # The end of stdin is the end of the benchmark, however that ended.
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gap", type=float, default=0.005, help="seconds between chunks")
    uvloop.run(_serve(parser.parse_args().gap))
