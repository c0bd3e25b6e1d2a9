"""What is known about a stream's tokens when it must go on elsewhere, and what the engines left can add."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ...engines.base import Engine
from ...http.client import Pool
from ...http.errors import Header, UpstreamError
from ..stream.generated import GeneratedStream
from ..workers import Worker
from .chunks import CannotGoOn

Json = dict[str, Any]

_PATIENCE = 10.0
_ANSWER_MAX = 64 * 1024 * 1024
_HALF = "\ufffd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Where a stream goes on."""

    tokens: int
    """Tokens of the answer that stay."""
    ids: bytes
    """Their ids, a comma after each."""
    rest: str = ""
    """Text of the last of them that the client has not had: an engine holds text back where a stop string
    could begin."""


class Engines:
    """Asks any of some engines small questions about tokens."""

    def __init__(self, pool: Pool, engine: Engine, headers: Sequence[Header]) -> None:
        self._pool = pool
        self._engine = engine
        self._headers = [*headers, (b"content-type", b"application/json")]

    async def _ask(self, worker: Worker, method: str, path: str, body: Json | None) -> Json:
        """Raises CannotGoOn."""
        raw = b"" if body is None else msgspec.json.encode(body)
        try:
            async with asyncio.timeout(_PATIENCE):
                response = await self._pool.request(
                    method, worker.url + path, headers=self._headers, body=raw
                )
                async with response:
                    answer = await response.read(_ANSWER_MAX)
            if response.status == 200:
                decoded: Json = msgspec.json.decode(answer)
                return decoded
            why = f"answered {response.status}"
        except TimeoutError:
            why = "did not answer"
        except UpstreamError as error:
            why = error.message
        except msgspec.DecodeError as error:
            why = str(error)
        raise CannotGoOn(f"{path} of {worker.name}: {why}")

    async def prompt_ids(self, worker: Worker, body: Json) -> bytes:
        """The ids of a request's prompt, without brackets. Raises CannotGoOn."""
        given = body.get("prompt")
        if isinstance(given, list) and given and all(type(item) is int for item in given):
            return msgspec.json.encode(given)[1:-1]
        request = self._engine.tokenize_request(body)
        if request is None:
            raise CannotGoOn("the prompt's tokens are not known")
        answer = await self._ask(worker, "POST", self._engine.tokenize_path, request)
        return msgspec.json.encode(answer.get("tokens"))[1:-1]

    async def context(self, worker: Worker) -> int:
        """The most tokens a prompt and its answer may have. Raises CannotGoOn."""
        answer = await self._ask(worker, "GET", self._engine.models_path, None)
        for model in answer.get("data") or ():
            if type(most := model.get("max_model_len")) is int:
                return most
        raise CannotGoOn("the engine does not say how long its context is")

    async def text(self, worker: Worker, model: Any, ids: bytes) -> str:
        """The text of tokens. Raises CannotGoOn."""
        tokens = msgspec.Raw(b"[" + ids.rstrip(b",") + b"]")
        body: Json = {"tokens": tokens} if model is None else {"model": model, "tokens": tokens}
        answer = await self._ask(worker, "POST", self._engine.detokenize_path, body)
        return str(answer.get(self._engine.detokenized_member))


async def cut(
    stream: GeneratedStream, body: Json, text: Callable[[bytes], Any], *, exact: bool = True
) -> Cut:
    """The last token whose text reached the client whole. `text` gives the text of ids, an awaitable.

    Usually the engine wrote one token and its text, and that is the place, if the engine is `exact` about it.
    Where it holds text back for stop strings, or wrote several tokens at once, the last of which can be half
    a character, the tokens' own text tells. Raises CannotGoOn.
    """
    stops = body.get("stop") and not body.get("include_stop_str_in_output")
    reached = bytes(stream.ids[: stream.reached])
    if exact and stream.single and not stops:
        return Cut(tokens=reached.count(b","), ids=reached)
    ids = bytes(stream.ids)
    ends = [place + 1 for place, byte in enumerate(ids) if byte == 44]
    sent = stream.sent()
    low, high = 0, len(ends)
    whole = _comparable(await text(ids), sent)
    if not whole.startswith(sent):
        raise CannotGoOn("the text of the tokens is not the text that was sent")
    # The fewest tokens that give all of it.
    while low < high:
        middle = (low + high) // 2
        part = _comparable(await text(ids[: ends[middle - 1]]), sent) if middle else ""
        if len(part.rstrip(_HALF)) >= len(sent):
            high = middle
        else:
            low = middle + 1
    while low < len(ends):
        part = _comparable(await text(ids[: ends[low - 1]]), sent) if low else ""
        if not part.endswith(_HALF) and part.startswith(sent):
            return Cut(tokens=low, ids=ids[: ends[low - 1]] if low else b"", rest=part[len(sent) :])
        low += 1
    if whole.endswith(_HALF):
        raise CannotGoOn("the tokens end in the middle of a character")
    return Cut(tokens=len(ends), ids=ids, rest=whole[len(sent) :])


def _comparable(text: str, sent: str) -> str:
    """Some tokenizers drop the space before the first word where nothing is before it."""
    return " " + text if sent.startswith(" ") and not text.startswith(" ") else text
