"""From a row to its requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import xxhash

from ..errors import ConfigError
from .inputs.openai_lines import Kind
from .inputs.rows import Row, RowError
from .prompt_text import PROMPTS, prompt_text, token_ids
from .sampling import SET_BY_US, check_sampling, shown
from .templates import Template, column_advice

__all__ = ["PromptSpec", "Prompts", "Request", "RowError"]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

_ANSWER_LIMITS = {
    CHAT: ("max_completion_tokens", "max_tokens"),
    COMPLETIONS: ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
}
"""Members that limit the answer's tokens; other paths generate none."""
_COMPLETION_TOKENS = 16
"""What OpenAI's API and vLLM take for `max_tokens` of /v1/completions where it is not said."""


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """Plain rows need one of `template`, `prompt_column` and `messages_column`; OpenAI rows need none."""

    model: str
    template: str | None = None
    """Jinja2 text of the user's message, for a chat; see templates.py."""
    system: str | None = None
    """Jinja2 text of the system message before it; where it comes out empty, there is no such message."""
    prompt_column: str | None = None
    """Text, or a list of token ids, to be completed without a chat template."""
    messages_column: str | None = None
    """A list of a chat's messages, or JSON text of one. Members that are null are left out."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Members of the body: temperature, max_tokens, stop, response_format, ..."""
    n: int = 1
    """Samples: answers to each row."""
    seed: int | None = None
    """The run's; see Prompts. None: 0, and only where there are several samples."""


class Request(NamedTuple):
    path: str
    body: bytes
    """JSON."""
    text: bytes
    """The prompt's, about; see prompt_text.py."""
    max_tokens: int | None
    """Of the answer, at most; None where nothing limits it, 0 where nothing is generated."""
    custom_id: str | None
    prompt_tokens: int | None
    """Exactly, where the prompt is a list of token ids."""


class Prompts:
    """Makes requests of rows.

    With n > 1, or with a run's seed and a temperature, each request of a plain row has a seed of its own, 31
    bits of a hash of (run's seed, row, sample), so that an answer which has to be computed again, in whatever
    job, is drawn alike. Not otherwise, for vLLM's sampler draws for seeded requests one after the other. A
    `seed` in `sampling` is kept instead: null leaves drawing to the engine; a number is refused with n > 1,
    since all samples would be the same. OpenAI rows get no seed.
    """

    def __init__(self, spec: PromptSpec, kind: Kind) -> None:
        """Raises ConfigError."""
        self._spec = spec
        self._kind = kind
        if kind == "openai":
            _check_openai(spec)
        else:
            _check_rows(spec)
        self._template = _template(spec.template, "template")
        self._system = _template(spec.system, "system template")
        drawn = spec.n > 1 or (spec.seed is not None and spec.sampling.get("temperature") != 0)
        self._seeded = kind == "rows" and drawn and "seed" not in spec.sampling

    def requests(self, row: Row) -> list[Request]:
        """One per sample, which for OpenAI rows is one. Raises RowError."""
        if self._kind == "openai":
            return [self._openai(row.columns)]
        path, prompt = self._prompt(row.columns)
        body = {"model": self._spec.model} | prompt | dict(self._spec.sampling)
        request = _request(path, body, None)
        return [self._sample(request, row.number, sample) for sample in range(self._spec.n)]

    def _sample(self, request: Request, row: int, sample: int) -> Request:
        if not self._seeded:
            return request
        seed = seed_of(self._spec.seed or 0, row, sample)
        # Only this differs between samples; the rest, which can be long, is written as JSON once.
        return request._replace(body=b'%b,"seed":%d}' % (request.body[:-1], seed))

    def _prompt(self, columns: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The path, and the prompt's members of the body."""
        if self._template is not None:
            return CHAT, {"messages": self._rendered(self._template, columns)}
        if self._spec.messages_column is not None:
            return CHAT, {"messages": _messages(columns, self._spec.messages_column)}
        return COMPLETIONS, {"prompt": _plain(columns, self._spec.prompt_column or "")}

    def _rendered(self, template: Template, columns: Mapping[str, Any]) -> list[dict[str, str]]:
        text = template.render(columns)
        if not text.strip():
            raise RowError("template: the text is empty")
        messages = [{"role": "user", "content": text}]
        system = self._system.render(columns) if self._system is not None else ""
        return [{"role": "system", "content": system}, *messages] if system.strip() else messages

    def _openai(self, columns: Mapping[str, Any]) -> Request:
        path, method, body = columns.get("url"), columns.get("method"), columns.get("body")
        if not isinstance(path, str) or path not in PROMPTS:
            raise RowError(f"url must be one of {', '.join(PROMPTS)}, not {shown(path)}")
        if method != "POST":
            raise RowError(f'method must be "POST", not {shown(method)}')
        if not isinstance(body, dict):
            raise RowError(f"body must be an object, not {shown(body)}")
        for member in ("stream", "background"):
            if body.get(member):
                raise RowError(f"body: {member} can't be used: {SET_BY_US[member]}")
        if not any(body.get(member) for member in PROMPTS[path]):
            raise RowError(f"body: no prompt; for {path} it is {' or '.join(PROMPTS[path])}")
        return _request(path, body | {"model": self._spec.model}, columns.get("custom_id"))


def seed_of(run: int, row: int, sample: int) -> int:
    """From 0 to 2^31 - 1: some engines keep seeds in signed 32-bit numbers."""
    return xxhash.xxh3_64_intdigest(f"{run} {row} {sample}".encode()) & 0x7FFF_FFFF


def _request(path: str, body: dict[str, Any], custom_id: str | None) -> Request:
    try:
        encoded = msgspec.json.encode(body)
        text = prompt_text(path, body)
    except (UnicodeEncodeError, OverflowError, TypeError, RecursionError) as error:
        raise RowError(f"the request can't be written as JSON: {error}") from None
    prompt = body.get("prompt")
    return Request(
        path=path,
        body=encoded,
        text=text,
        max_tokens=_max_tokens(path, body),
        custom_id=custom_id,
        prompt_tokens=len(prompt) if token_ids(prompt) and isinstance(prompt, list) else None,
    )


def _max_tokens(path: str, body: Mapping[str, Any]) -> int | None:
    if path not in _ANSWER_LIMITS:
        return 0
    for member in _ANSWER_LIMITS[path]:
        most = body.get(member)
        if isinstance(most, int):
            # What is out of range the engine refuses, and the row says so.
            return int(most) if 0 < most < 1 << 32 else None
    return _COMPLETION_TOKENS if path == COMPLETIONS else None


# Columns


def _value(columns: Mapping[str, Any], name: str) -> Any:
    if name not in columns:
        raise RowError(f"no column '{name}'; {column_advice(name, columns)}")
    return columns[name]


def _plain(columns: Mapping[str, Any], name: str) -> str | list[int]:
    value = _value(columns, name)
    if isinstance(value, str | list) and not value:
        raise RowError(f"column '{name}' is empty")
    if isinstance(value, str) or token_ids(value):
        return value  # type: ignore[no-any-return] # token_ids() knows
    raise RowError(f"column '{name}' must be text or a list of token ids, not {shown(value)}")


def _messages(columns: Mapping[str, Any], name: str) -> list[Any]:
    value = _value(columns, name)
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise RowError(f"column '{name}' is text, but no JSON: {error}") from None
    if not isinstance(value, list):
        raise RowError(f"column '{name}' must be a list of messages, not {shown(value)}")
    if not value:
        raise RowError(f"column '{name}' is empty")
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowError(f"column '{name}': message {index} must be an object with a role")
        if not isinstance(message.get("content"), str | list | None):
            raise RowError(f"column '{name}': the content of message {index} must be text or a list of parts")
    return [_without_nulls(message) for message in value]


def _without_nulls(value: Any) -> Any:
    """A struct column has all members in all messages; null means there is none.

    Null content stays: an assistant's message that only calls tools has it.
    """
    if isinstance(value, dict):
        return {
            key: _without_nulls(item)
            for key, item in value.items()
            if item is not None or (key == "content" and "role" in value)
        }
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, bytes):
        raise RowError("messages hold binary data; images are data URLs or links")
    return value


# What is checked once


def _template(source: str | None, name: str) -> Template | None:
    return Template(source, name) if source is not None else None


def _check_openai(spec: PromptSpec) -> None:
    for name in ("template", "system", "prompt_column", "messages_column", "sampling"):
        if getattr(spec, name):
            raise ConfigError(
                f"{_flag(name)} is for plain rows, but the input's lines are OpenAI requests",
                hint="Write it into the lines' bodies.",
            )
    if spec.n != 1:
        raise ConfigError(
            f"--samples {spec.n}: the input's lines are OpenAI requests, which are sent once",
            hint="Set `n` in the lines' bodies.",
        )


def _check_rows(spec: PromptSpec) -> None:
    ways = {
        "template": spec.template,
        "prompt_column": spec.prompt_column,
        "messages_column": spec.messages_column,
    }
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        flags = [_flag(name) for name in given]
        raise ConfigError(
            f"one of {', '.join(map(_flag, ways))} must say what the prompt is, not"
            f" {' and '.join(flags) or 'none'}",
            hint="A template makes a chat of columns; the prompt column is completed as it is; the messages"
            " column has whole chats.",
        )
    if spec.system is not None and spec.template is None:
        raise ConfigError(
            f"--system goes with --template, not with {_flag(given[0])}", hint="Put its text into the column."
        )
    if spec.n < 1:
        raise ConfigError(
            f"--samples must be at least 1, not {spec.n}", hint="It is the number of answers to a row."
        )
    check_sampling(spec.sampling, chat=spec.prompt_column is None)
    if spec.n > 1 and spec.sampling.get("seed") is not None:
        raise ConfigError(
            f"--sampling: with `seed`, all {spec.n} samples of a row would be the same",
            hint="Give --seed, of which each sample's is made.",
        )


def _flag(name: str) -> str:
    """Of the command line, for a field of PromptSpec."""
    return f"--{name.replace('_', '-')}"
