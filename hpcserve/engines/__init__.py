"""Engines by name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the fake engine's process comes through here and needs none of it
    from ..config.model import ModelSpec
    from .base import Engine

_MODULES = {
    "vllm": ("vllm", "VLLM"),
    "sglang": ("sglang", "SGLang"),
    "tensorrt-llm": ("tensorrt_llm", "TensorRTLLM"),
    "fake": ("fake", "Fake"),
    "fake-sglang": ("fake", "FakeSGLang"),
    "fake-tensorrt-llm": ("fake", "FakeTensorRTLLM"),
}


def get(name: str) -> Engine:
    """The engine with that `Engine.name`. Raises KeyError where there is none."""
    module, cls = _MODULES[name]
    engine: Engine = getattr(import_module(f".{module}", __package__), cls)()
    return engine


def of(model: ModelSpec) -> Engine:
    """The engine of a run. Raises ConfigError where `engine_args` ask for one that does not exist."""
    return get(model.engine).configured(model.engine_args)
