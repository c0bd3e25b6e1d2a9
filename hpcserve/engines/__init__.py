"""Engines by name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the fake engine's process comes through here and needs none of it
    from .base import Engine

_MODULES = {
    "vllm": ("vllm", "VLLM"),
    "sglang": ("sglang", "SGLang"),
    "tensorrt-llm": ("tensorrt_llm", "TensorRTLLM"),
    "fake": ("fake", "Fake"),
}


def get(name: str) -> Engine:
    """The engine called `name` in model.yaml. Raises KeyError for a name the schema would refuse."""
    module, cls = _MODULES[name]
    engine: Engine = getattr(import_module(f".{module}", __package__), cls)()
    return engine
