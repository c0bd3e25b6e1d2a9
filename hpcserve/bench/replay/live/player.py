"""The load: each request of a trace sent when its time comes, and when its answer came."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ....http.client import Pool, UpstreamError, UpstreamResponse
from ...router.peers import MODEL
from ..trace import TraceRequest
from . import prompts
from .scale import Scale

_HEADERS = ((b"content-type", b"application/json"), (b"accept", b"text/event-stream"))
_CHOICE, _NO_CHOICE, _DONE = b'"choices":', b'"choices":[]', b"data: [DONE]"
_WORKER = re.compile(rb'"decode_worker_id":(\d+)')
_REFUSAL = 4096


@dataclass(slots=True, kw_only=True)
class Answer:
    """What became of one request. Live seconds."""

    late: float = 0.0
    """From when it should have been sent until it was."""
    first: float | None = None
    """From then to the first event of the answer, and to the last."""
    last: float = 0.0
    tokens: int = 0
    """Asked for."""
    prompt_tokens: int = 0
    """As the engine says, and of these in its cache."""
    cached_tokens: int = 0
    worker: str | None = None
    """Where the answer says who gave it."""
    failure: str | None = "unfinished"
    """None when it came whole."""


async def play(
    trace: Sequence[TraceRequest], url: str, scale: Scale, *, patience: float, extra: dict[str, object]
) -> list[Answer]:
    """Ends at the latest `patience` seconds after the last request was sent. `extra` goes into bodies."""
    answers = [Answer(tokens=scale.answer_tokens(request)) for request in trace]
    pool = Pool(connect_timeout=30.0, idle_per_origin=4096)
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()
    began = loop.time() - scale.arrival(trace[0])
    try:
        for request, answer in zip(trace, answers, strict=True):
            body = _body(request, scale, extra)
            due = began + scale.arrival(request)
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            answer.late = loop.time() - due
            tasks.add(asyncio.create_task(_ask(pool, f"{url}/v1/chat/completions", body, answer)))
        _, unfinished = await asyncio.wait(tasks, timeout=patience)
        for task in unfinished:
            task.cancel()
        # A bug in the load generator is not an error of the router.
        await asyncio.gather(*(tasks - unfinished))
        await asyncio.gather(*unfinished, return_exceptions=True)
    finally:
        await pool.close()
    return answers


def _body(request: TraceRequest, scale: Scale, extra: dict[str, object]) -> bytes:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompts.text(request, scale)}],
        "max_tokens": scale.answer_tokens(request),
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    return json.dumps(body | extra).encode()


async def _ask(pool: Pool, url: str, body: bytes, answer: Answer) -> None:
    loop = asyncio.get_running_loop()
    sent = loop.time()
    try:
        async with await pool.request("POST", url, headers=_HEADERS, body=body) as response:
            if response.status != 200:
                text = (await response.read(_REFUSAL)).decode("utf-8", "replace")
                answer.failure = f"HTTP {response.status}: {text[:200]}"
                return
            await _read(response, answer, sent)
    except UpstreamError as error:
        answer.failure = str(error)


async def _read(response: UpstreamResponse, answer: Answer, sent: float) -> None:
    loop = asyncio.get_running_loop()
    rest = b""
    done = False
    async for chunk in response:
        now = loop.time() - sent
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            if event.startswith(_DONE):
                done = True
            elif _NO_CHOICE in event:
                note_usage(event, answer)
            elif _CHOICE in event:
                answer.last = now
                if answer.first is None:
                    answer.first = now
                    if (worker := _WORKER.search(event)) is not None:
                        answer.worker = worker[1].decode()
            elif b"error" in event:
                answer.failure = event.decode("utf-8", "replace")[:200]
                return
    answer.failure = None if done and answer.first is not None else "the answer broke off"


def note_usage(event: bytes, answer: Answer) -> None:
    """From a stream's last chunk."""
    usage = json.loads(event.partition(b"data: ")[2]).get("usage") or {}
    answer.prompt_tokens = usage.get("prompt_tokens", 0)
    answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
