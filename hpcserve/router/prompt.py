"""What a request will cost and which prefix it shares, read off its JSON bytes: nothing is tokenized.

A prompt is what the engine's template puts first to last: tools, system text, then messages. Its bytes
are cut into chunks of `CHUNK`; a chunk's hash is XXH3-64 seeded with the hash before it, so equal hashes
mean equal prefixes. The last bracket or quote of the prompt is left out: the next turn of a conversation
goes on before it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

import msgspec
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from ..engines.kv_events import units
from .demand import Demand

if TYPE_CHECKING:
    from .call import Call, Raw

CHUNK = 1024
"""Bytes. Half of it would double the router's work on long prompts, twice of it would miss the shared
system prompts of a few hundred words."""
MOST_CHUNKS = 8192
"""8 MiB of prompt, two million tokens: what is longer shares its first part."""
TOKENS_PER_BYTE = 0.25
"""Until an engine has said how many tokens a prompt had."""
ANSWER_TOKENS = 256.0
"""Until answers were seen."""
IMAGE_TOKENS = 1000
"""For each image, sound or file that is inside of a prompt as base64."""
LOWEST_PRIORITY = -100

_MOST_MODELS = 1024
_WEIGHT = 0.05
_LONGEST_SESSION = 200
_GENERATES = ("completions", "responses", "messages")
_BLOCK_SIZE = 1000
_LETTERS = re.compile(rb"[A-Za-z0-9+/=_-]+")
_BLOCK = re.compile(rb"[A-Za-z0-9+/=_-]{1000}")
_BASE64 = re.compile(rb"[A-Za-z0-9+/=_-]{2000}")
PROBE_EVERY, PROBE = 4096, 256


class _Model:
    """What was learned about one model's requests."""

    __slots__ = ("answer", "answers", "prompts", "ratio")

    def __init__(self) -> None:
        self.ratio = TOKENS_PER_BYTE
        self.answer = ANSWER_TOKENS
        self.prompts = self.answers = 0
        """Samples so far: the first ones count for more."""


class _Prompt(msgspec.Struct, gc=False):
    """`size` bytes of text in `data`."""

    data: memoryview | None
    size: int
    tokens: int = 0
    """Where they could be counted."""
    images: int = 0
    """That are not in `size`."""
    plain: bool = True
    """Text of one prompt, no images: its tokens tell which KV blocks it has."""


_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_text = msgspec.json.Decoder(str).decode
_decode = msgspec.json.Decoder().decode
_ABSENT = (b"", b"null", b'""', b"[]")
_BROKEN = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_BEFORE = ("tools", "system", "instructions")
"""What templates put before the messages."""
_TEMPLATE = ("chat_template", "chat_template_kwargs", "reasoning_effort")
LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_SESSION = ("session_id", "prompt_cache_key", "user")
SELDOM = frozenset({*_BEFORE, *_TEMPLATE, *_SESSION, "cache_salt", "n", "priority", "service_tier"})
"""Most requests have none of these, which takes one look to see."""
PLAIN_SPACE = units.space()
_places: list[slice] = []
"""Of chunks in a prompt, as many as any prompt had so far."""


class Prompts:
    """One per router process. `served` are the names of base models; other names are LoRAs."""

    def __init__(self, served: Collection[str] = ()) -> None:
        self.served = frozenset(served)
        """May be replaced when the workers change."""
        self._models: dict[str, _Model] = {}

    def demand(self, call: Call) -> Demand:
        """A body that can't be read gives a Demand without a chain: the engine says what is wrong with it."""
        body, exchange = call.body, call.exchange
        if (exchange.header(b"content-type") or b"").startswith(b"multipart/"):
            return self._unread(0)
        fields = call.fields
        if fields is None:
            try:
                fields = _decode_fields(body)
            except _BROKEN:
                return self._unread(len(body))
        # A value of the wrong type counts as none: it is the engine's to refuse.
        usual = SELDOM.isdisjoint(fields)
        model = _text(fields.get("model")) or ""
        known = self.model(model)
        lora = "" if model in self.served else model
        salt = "" if usual else _text(fields.get("cache_salt")) or ""
        space = units.space(lora, salt) if lora or salt else PLAIN_SPACE
        generates = exchange.path.rstrip("/").endswith(_GENERATES)
        prompt = _prompt(fields, usual) if generates else _Prompt(None, len(body), plain=False)
        size, data = prompt.size, prompt.data
        ratio = prompt.tokens / size if prompt.tokens else known.ratio
        session = exchange.header(b"x-session-id")
        priority = exchange.header(b"x-hpcserve-priority")
        return Demand(
            prompt_tokens=max(1, prompt.images * IMAGE_TOKENS + int(size * ratio)),
            output_tokens=_answer(fields, known.answer, usual) if generates else 0,
            chain=() if data is None else chain(data, space if usual else _seed(fields, space)),
            chunk_tokens=CHUNK * ratio,
            session=_session(session, fields, usual),
            priority=0 if usual and priority is None else _priority(priority, fields),
            model=model,
            prompt_bytes=0 if prompt.tokens or prompt.images else size,
            space=space if prompt.plain else None,
        )

    def learn(self, demand: Demand, prompt_tokens: int, completion_tokens: int) -> None:
        """From an engine's own `usage` of one answer."""
        known = self.model(demand.model)
        if prompt_tokens > 0 and demand.prompt_bytes >= CHUNK:
            known.prompts += 1
            weight = max(_WEIGHT, 1 / known.prompts)
            known.ratio += weight * (prompt_tokens / demand.prompt_bytes - known.ratio)
        if completion_tokens > 0:
            known.answers += 1
            known.answer += max(_WEIGHT, 1 / known.answers) * (completion_tokens - known.answer)

    def model(self, name: str) -> _Model:
        """What was learned about its requests."""
        known = self._models.get(name)
        if known is None:
            if len(self._models) >= _MOST_MODELS:
                # Names come from clients; the oldest goes.
                del self._models[next(iter(self._models))]
            known = self._models[name] = _Model()
        return known

    def _unread(self, size: int) -> Demand:
        return Demand(prompt_tokens=max(1, int(size * TOKENS_PER_BYTE)), output_tokens=int(ANSWER_TOKENS))


def _prompt(fields: Raw, usual: bool) -> _Prompt:
    """`usual`: there are no `SELDOM` members."""
    last = None
    for name in ("messages", "prompt", "input"):
        last = fields.get(name)
        if last is not None and _given(last):
            break
    else:
        return _Prompt(None, 0, plain=False)
    data = memoryview(last)[:-1]
    if not usual:
        before = [memoryview(fields[key]) for key in _BEFORE if key in fields and _given(fields[key])]
        if before:
            data = memoryview(b"".join((*before, data)))
    size = len(data)
    if name == "prompt" and size and data[0] == 0x5B:
        if bytes(data[1:64]).lstrip()[:1].isdigit():
            return _Prompt(data, size, bytes(data).count(b",") + 1)
        return _Prompt(data, size, plain=False)
    return _without_base64(data) if _may_hold_base64(data) else _Prompt(data, size)


def _may_hold_base64(data: memoryview) -> bool:
    """Are there stretches without a space? A look every few kilobytes finds all that matter."""
    text = data.tobytes()
    for start in range(PROBE, len(text) - PROBE, PROBE_EVERY):
        if text.find(b" ", start, start + PROBE) < 0:
            return True
    return False


def _without_base64(data: memoryview) -> _Prompt:
    """Images in base64 take about IMAGE_TOKENS each, and not one token for four letters."""
    prompt = _Prompt(data, len(data))
    at = end = 0
    while at < len(data):
        # A run is as long as two blocks, so that one is all inside of it, wherever it begins.
        if _BLOCK.match(data, at):
            found = _BASE64.search(data, max(end, at - _BLOCK_SIZE), at + 2 * _BLOCK_SIZE)
            if found is not None:
                start = found.start()
                run = _LETTERS.match(data, start)
                end = len(data) if run is None else run.end()
                prompt.size -= end - start
                prompt.images += 1
                prompt.plain = False
                at = end - end % _BLOCK_SIZE
        at += _BLOCK_SIZE
    return prompt


def _seed(fields: Raw, space: int) -> int:
    seed = space
    for name in _TEMPLATE:
        raw = fields.get(name)
        if raw is not None and _given(raw):
            seed = xxh3_64_intdigest(raw, seed)
    return seed


def chain(data: memoryview, seed: int) -> tuple[int, ...]:
    count = min(len(data) // CHUNK, MOST_CHUNKS)
    if not count:
        return ()
    while len(_places) < count:
        start = len(_places) * CHUNK
        _places.append(slice(start, start + CHUNK))
    hashes = []
    for place in _places[:count]:
        seed = xxh3_64_intdigest(data[place], seed)
        hashes.append(seed)
    return tuple(hashes)


def _given(raw: msgspec.Raw) -> bool:
    return len(raw) > 4 or bytes(raw) not in _ABSENT


def _answer(fields: Raw, expected: float, usual: bool) -> int:
    tokens = int(expected) or 1
    for name in LIMITS:
        raw = fields.get(name)
        most = None if raw is None else _whole(raw)
        if most is not None and most >= 0:
            tokens = min(tokens, most)
            break
    return tokens if usual else tokens * min(max(_whole(fields.get("n")) or 1, 1), 128)


def _session(header: bytes | None, fields: Raw, usual: bool) -> str | None:
    if header:
        return header.decode("latin-1")[:_LONGEST_SESSION]
    if usual:
        return None
    for key in _SESSION:
        name = _text(fields.get(key))
        if name:
            return (
                name if len(name) <= _LONGEST_SESSION else xxh3_64_hexdigest(name.encode("utf-8", "replace"))
            )
    return None


def _priority(header: bytes | None, fields: Raw) -> int:
    """A client can step back, never to the front: that is its key's business.

    The body's `priority` is vLLM's, where a higher number is served later; `service_tier` is OpenAI's.
    """
    if header is not None:
        text = header.strip().lower()
        if text == b"batch":
            return -1
        number = int(text) if re.fullmatch(rb"-?\d{1,6}", text) else 0
    elif asked := _whole(fields.get("priority")):
        number = -asked
    else:
        tier = fields.get("service_tier")
        number = -1 if tier is not None and bytes(tier) == b'"flex"' else 0
    return max(LOWEST_PRIORITY, min(0, number))


def _text(raw: msgspec.Raw | None) -> str | None:
    if raw is None:
        return None
    try:
        return _decode_text(raw)
    except _BROKEN:
        return None


def _whole(raw: msgspec.Raw | None) -> int | None:
    if raw is None:
        return None
    try:
        value = _decode(raw)
    except _BROKEN:
        return None
    return value if type(value) is int else None
