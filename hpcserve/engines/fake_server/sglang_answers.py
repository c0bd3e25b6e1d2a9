"""Answers in SGLang's form (0.5.23): entrypoints/openai/protocol.py, sse_utils.py and serving_*.py.

Streams differ from vLLM's in more than names: a chat's reason to end has an event of its own, after all text,
and no chat's event names tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

from .answers import StreamedAnswer, WholeAnswer
from .sequence import Output, Sequence

Json = dict[str, Any]


class SGLangStream(StreamedAnswer):
    """A stream of events."""

    def __init__(self, *parts: Any, **more: Any) -> None:
        super().__init__(*parts, **more)
        self._reasons: list[Json] = []

    def _send_choice(self, sequence: Sequence, output: Output) -> None:
        if not self._generation.chat or output.finish_reason is None:
            super()._send_choice(sequence, output)
            return
        if output.text:
            said = Output(text=output.text, tokens=output.tokens)
            super()._send_choice(sequence, said)
        else:
            self._produced[sequence.index] += len(output.tokens)
        reason = {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
        self._reasons.append({"index": sequence.index, "delta": {}, "logprobs": None, **reason})

    def _end(self, cached: int | None) -> None:
        for reason in self._reasons:
            self._send([reason], self._produced[reason["index"]], {})
        super()._end(cached)

    def _send(self, choices: Items[Json], produced: int, extra: Json) -> None:
        chat = self._generation.chat
        if chat and choices[0]["delta"].get("content") == "" and "role" not in choices[0]["delta"]:
            return
        shaped = [_chat_choice(choice) if chat else _choice(choice) for choice in choices]
        super()._send(shaped, produced, {} if chat or self._generation.continuous_usage else {"usage": None})


class SGLangWhole(WholeAnswer):
    """An answer in one piece."""

    def _body(self, answers: Items[Sequence], finals: Items[Output]) -> Json:
        whole = super()._body(answers, finals)
        body = {name: whole[name] for name in ("id", "object", "created", "model")}
        body["choices"] = [_choice(choice) for choice in whole["choices"]]
        return {**body, "usage": whole["usage"], "metadata": {"weight_version": "default"}}


def _choice(choice: Json) -> Json:
    shaped = {"index": choice["index"]}
    if "message" in choice:
        said = choice["message"]
        shaped["message"] = {
            "role": said["role"], "content": said["content"], "reasoning_content": None, "tool_calls": None,
        }  # fmt: skip
    else:
        shaped["text"] = choice["text"]
    shaped |= {
        "logprobs": choice["logprobs"],
        "finish_reason": choice["finish_reason"],
        "matched_stop": choice.get("stop_reason"),
    }
    # Left out, and not null, where they were not asked for.
    names = ("token_ids", "prompt_token_ids")
    return shaped | {name: choice[name] for name in names if choice.get(name) is not None}


def _chat_choice(choice: Json) -> Json:
    return {
        "index": choice["index"],
        "delta": {"reasoning_content": None, **choice["delta"]},
        "logprobs": choice["logprobs"],
        "finish_reason": choice["finish_reason"],
        "matched_stop": choice.get("stop_reason"),
    }
