"""Models small enough to be made when a test asks for them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from demo.prepare_model import smollm2

__all__ = ["greedy", "smollm2", "tiny_llama"]

_TEXT = (
    "The quick brown fox jumps over the lazy dog. A cluster is many computers that share one queue. "
    "Prefill reads the prompt, decode writes the answer, and the cache between them crosses the network. "
    "One node asks another for blocks of keys and values; the answer streams back meanwhile. "
    "Queues are long on Monday morning, short at night, and nobody likes to lose an hour to a timeout. "
    "0123456789 abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ !?,.;:()[]{}<>+-*/=_'\"#@&% "
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_llama(path: Path) -> Path:
    """Make `path` a Llama with 2.5 M random float32 weights, always the same, and a 512-token tokenizer.

    Nothing is done if it is there; it appears whole or not at all.
    """
    if (path / "config.json").is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
        made = Path(work) / "model"
        made.mkdir(mode=0o755)
        _save_tokenizer(made)
        _save_weights(made)
        if path.exists():
            shutil.rmtree(path)  # a directory without a config.json: not a model
        os.replace(made, path)
    return path


def greedy(path: Path, prompt: str | list[int], tokens: int) -> list[int]:
    """The most likely `tokens` tokens after a prompt, as transformers computes them: ids, because random
    tokens are no whole characters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
    size = len(ids)
    with torch.inference_mode():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return list(ids[size:])


def _save_tokenizer(target: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([_TEXT] * 8, trainer)
    tokenizer.save(str(target / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 4096,
        "chat_template": _CHAT_TEMPLATE,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config))


def _save_weights(target: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    generator_state = torch.random.get_rng_state()
    torch.manual_seed(20240607)
    try:
        model: Any = LlamaForCausalLM(  # type: ignore[no-untyped-call]
            LlamaConfig(
                vocab_size=512,
                hidden_size=256,
                intermediate_size=512,
                num_hidden_layers=4,
                num_attention_heads=8,
                num_key_value_heads=4,
                max_position_embeddings=4096,
                bos_token_id=0,
                eos_token_id=1,
                tie_word_embeddings=False,
                initializer_range=0.3,  # wide enough that greedy answers differ between prompts
            )
        )
    finally:
        torch.random.set_rng_state(generator_state)
    model.to(torch.float32).save_pretrained(target, safe_serialization=True)
    (target / "model.safetensors").chmod(0o644)  # safetensors writes 0600
