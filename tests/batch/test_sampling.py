"""Keys of `--sampling`."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from hpcserve.batch.sampling import CHAT_KEYS, COMPLETION_KEYS, SET_BY_US, check_sampling
from hpcserve.errors import ConfigError

_TRANSFERS = {"kv_transfer_params", "ec_transfer_params"}
"""Set by the router."""


def members(module: str, name: str) -> set[str]:
    """Of a request at the installed vLLM, read without importing it."""
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "entrypoints/openai" / module / "protocol.py"
    [request] = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    fields = {
        node.target.id
        for node in request.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    return {field for field in fields if not field.startswith("_")}


@pytest.mark.parametrize(
    ("module", "request_", "keys"),
    [
        ("chat_completion", "ChatCompletionRequest", CHAT_KEYS),
        ("completion", "CompletionRequest", COMPLETION_KEYS),
    ],
)
def test_the_keys_are_those_of_the_installed_vllm(module: str, request_: str, keys: frozenset[str]) -> None:
    assert members(module, request_) - _TRANSFERS - SET_BY_US.keys() == keys


def test_a_key_of_the_other_api_is_refused() -> None:
    check_sampling({"reasoning_effort": "low"}, chat=True)
    with pytest.raises(ConfigError, match="completions have no member `reasoning_effort`"):
        check_sampling({"reasoning_effort": "low"}, chat=False)


def test_the_nearest_key_is_named() -> None:
    with pytest.raises(ConfigError) as refused:
        check_sampling({"max_token": 5}, chat=True)
    assert refused.value.hint is not None
    assert refused.value.hint.startswith("Did you mean `max_tokens`?")
