"""Response bodies with vLLM 0.32's fields, in its order, nulls included.

Streamed chunks leave out what vLLM leaves out (`exclude_unset`); whole responses do not.
"""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import Any

from . import language, tokens
from .flags import Flags
from .requests import Generation
from .sequence import Output, Sequence

Json = dict[str, Any]

EMBEDDING_SIZE = 32


def usage(prompt: int, completion: int, cached: int | None = None) -> Json:
    """`cached`: the prompt tokens that were in the KV cache, where the server tells them."""
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": None if cached is None else {"cached_tokens": cached},
        "completion_tokens_details": None,
    }


def short_usage(prompt: int, completion: int, cached: int | None = None) -> Json:
    """Usage in a stream's last chunk, which has no nulls."""
    numbers: Json = {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
    }
    if cached is not None:
        numbers["prompt_tokens_details"] = {"cached_tokens": cached}
    return numbers


def whole(
    generation: Generation,
    created: int,
    answers: Items[Sequence],
    finals: Items[Output],
    *,
    details: bool = False,
) -> Json:
    """The body of a request that did not stream; answers are in order of prompt, then sample.

    `details`: usage says how many prompt tokens were cached, those of the last answer, as in vLLM.
    """
    choice = _chat_choice if generation.chat else _completion_choice
    pairs = zip(answers, finals, strict=True)
    completion = sum(answer.output_length for answer in answers)
    # A sample of the same prompt has the same prompt tokens: they count once per prompt.
    prompt = sum(len(ids) for ids in generation.prompts)
    body: Json = {
        "id": generation.request_id,
        "object": "chat.completion" if generation.chat else "text_completion",
        "created": created,
        "model": generation.model,
        "choices": [choice(generation, i, answer, final) for i, (answer, final) in enumerate(pairs)],
        "service_tier": None,
        "system_fingerprint": None,
        "usage": usage(prompt, completion, answers[-1].cached_tokens if details else None),
    }
    if generation.chat:
        body["prompt_logprobs"] = None
        body["prompt_token_ids"] = generation.prompts[0] if generation.return_token_ids else None
        body["prompt_text"] = None
    body["kv_transfer_params"] = answers[0].result_kv_params
    body["ec_transfer_params"] = None
    body["metrics"] = None
    return body


def _completion_choice(generation: Generation, index: int, answer: Sequence, final: Output) -> Json:
    prompt = answer.tokens[: answer.prompt_length]
    text = tokens.decode(prompt) if generation.echo_prompt else ""
    logprobs = None
    if answer.sampling.logprobs is not None:
        entries: list[Items[tuple[int, float]] | None] = list(answer.logprobs)
        ids = answer.output_tokens
        if generation.echo_prompt:
            entries = [*_unranked(answer.prompt_length), *entries]
            ids = answer.tokens
        logprobs = completion_logprobs(ids, entries, 0)
    return {
        "index": index,
        "text": text + answer.text,
        "logprobs": logprobs,
        "finish_reason": final.finish_reason,
        "stop_reason": final.stop_reason,
        "token_ids": answer.output_tokens if generation.return_token_ids else None,
        "prompt_logprobs": None,
        "prompt_token_ids": prompt if generation.return_token_ids else None,
        "routed_experts": None,
    }


def _chat_choice(generation: Generation, index: int, answer: Sequence, final: Output) -> Json:
    logprobs = None
    if answer.sampling.logprobs is not None:
        logprobs = chat_logprobs(answer.output_tokens, answer.logprobs, answer.sampling.logprobs)
    return {
        "index": index,
        "message": {
            "role": "assistant",
            "content": (generation.echo or "") + answer.text,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": None,
        },
        "logprobs": logprobs,
        "finish_reason": final.finish_reason,
        "stop_reason": final.stop_reason,
        "token_ids": answer.output_tokens if generation.return_token_ids else None,
        "routed_experts": None,
    }


def chunk_head(generation: Generation, created: int) -> Json:
    """The fields all chunks of a stream begin with."""
    return {
        "id": generation.request_id,
        "object": "chat.completion.chunk" if generation.chat else "text_completion",
        "created": created,
        "model": generation.model,
    }


def role_choice(index: int) -> Json:
    """A chat stream's first choice."""
    return {
        "index": index,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }


def echo_choice(index: int, text: str) -> Json:
    return {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}


def chat_chunk_choice(generation: Generation, answer: Sequence, output: Output) -> Json:
    logprobs = None
    if answer.sampling.logprobs is not None and output.tokens:
        logprobs = chat_logprobs(
            output.tokens, answer.logprobs[-len(output.tokens) :], answer.sampling.logprobs
        )
    choice: Json = {
        "index": answer.index,
        "delta": {"content": output.text},
        "logprobs": logprobs,
        "finish_reason": output.finish_reason,
    }
    if output.finish_reason is not None:
        choice["stop_reason"] = output.stop_reason
    choice["token_ids"] = list(output.tokens) if generation.return_token_ids else None
    return choice


def completion_chunk_choice(
    generation: Generation, answer: Sequence, output: Output, offset: int, *, first: bool
) -> Json:
    """`offset` is the length of the text of the tokens before; `first` is the answer's first chunk."""
    prompt = answer.tokens[: answer.prompt_length]
    echoes = first and generation.echo_prompt
    logprobs = None
    if answer.sampling.logprobs is not None and output.tokens:
        entries: list[Items[tuple[int, float]] | None] = list(answer.logprobs[-len(output.tokens) :])
        ids = list(output.tokens)
        if echoes:
            entries = [*_unranked(len(prompt)), *entries]
            ids = prompt + ids
        logprobs = completion_logprobs(ids, entries, offset)
    return {
        "index": answer.index,
        "text": (tokens.decode(prompt) if echoes else "") + output.text,
        "logprobs": logprobs,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
        "prompt_token_ids": prompt if first and (generation.return_token_ids or echoes) else None,
        "token_ids": list(output.tokens) if generation.return_token_ids else None,
    }


def _unranked(count: int) -> list[None]:
    """Logprobs of echoed prompt tokens: the toy model has none."""
    return [None] * count


def completion_logprobs(
    ids: Iterable[int], entries: Iterable[Items[tuple[int, float]] | None], offset: int
) -> Json:
    """Logprobs of /v1/completions. An entry is the ranked (token, logprob) list, None for a prompt token."""
    offsets: list[int] = []
    texts: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for token, entry in zip(ids, entries, strict=True):
        text = tokens.decode((token,))
        offsets.append(offset)
        texts.append(text)
        offset += len(text)
        if entry is None:
            values.append(None)
            tops.append(None)
            continue
        top = {tokens.decode((candidate,)): value for candidate, value in entry}
        values.append(top.setdefault(text, -9999.0) if token == tokens.EOS else top[text])
        tops.append(top)
    return {"text_offset": offsets, "token_logprobs": values, "tokens": texts, "top_logprobs": tops}


def chat_logprobs(ids: Iterable[int], entries: Iterable[Items[tuple[int, float]]], top: int) -> Json:
    content: list[Json] = []
    for token, entry in zip(ids, entries, strict=True):
        first = _logprob(token, entry[0][1])
        first["top_logprobs"] = [_logprob(candidate, value) for candidate, value in entry[:top]]
        content.append(first)
    return {"content": content}


def _logprob(token: int, value: float) -> Json:
    text = tokens.decode((token,))
    return {"token": text, "logprob": value, "bytes": list(text.encode())}


def models(flags: Flags, created: int) -> Json:
    return {"object": "list", "data": [_model(flags, name, created) for name in flags.served_model_names]}


def _model(flags: Flags, name: str, created: int) -> Json:
    permission = {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "root": flags.model,
        "parent": None,
        "max_model_len": flags.max_model_len,
        "permission": [permission],
    }


def embeddings(model: str, request_id: str, prompts: Items[list[int]], size: int, *, as_base64: bool) -> Json:
    data: list[Json] = []
    for index, ids in enumerate(prompts):
        vector: list[float] | str = language.embedding(model, ids, size)
        if as_base64:
            vector = base64.b64encode(struct.pack(f"<{size}f", *vector)).decode()
        data.append({"index": index, "object": "embedding", "embedding": vector})
    count = sum(map(len, prompts))
    return {
        "id": request_id,
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": data,
        "usage": usage(count, 0),
    }
