"""What Dynamo's mocker is started with: a tokenizer that knows our words, and the fake engines' speed.

Its frontend speaks its own protocol to engines, so it can't be put before the fake engines; its mocker
stands in for them with as many blocks of the same size. The speeds are given as the tables it reads.
"""

from __future__ import annotations

import array
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ..engine import EngineModel
from .prompts import WORDS
from .scale import Scale

_SPECIALS = ("<unk>", "<s>", "</s>")
_LONGEST = 262_144
_MOST_ANSWERS = 256
_POINTS = 96
"""Of each axis of the table of decode steps."""


def write_model(folder: Path) -> None:
    """A tokenizer for which each of our words is one token, and a chat template that adds nothing."""
    folder.mkdir()
    vocabulary = {word: number for number, word in enumerate((*_SPECIALS, *WORDS))}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number, "content": word, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True,
            }
            for number, word in enumerate(_SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }  # fmt: skip
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
        "intermediate_size": 64, "vocab_size": len(vocabulary), "max_position_embeddings": _LONGEST,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "model_max_length": _LONGEST,
        "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }  # fmt: skip
    for name, content in (("tokenizer", tokenizer), ("config", config), ("tokenizer_config", settings)):
        (folder / f"{name}.json").write_text(json.dumps(content))


def write_speeds(path: Path, model: EngineModel, scale: Scale) -> None:
    """Milliseconds of a prefill by its tokens, and of a decode step by tokens held and their mean."""
    lengths = (1.0, float(_LONGEST))
    rate = scale.prefill_rate(model)
    held = _steps(1.0, float(model.blocks * scale.block_tokens))
    contexts = _steps(1.0, float(_LONGEST / scale.prompt))
    base, each = scale.step_base(model), scale.step_per_answer(model)
    gaps = [
        1e3 * (base + each * min(max(tokens / context, 1.0), _MOST_ANSWERS))
        for tokens in held
        for context in contexts
    ]
    with zipfile.ZipFile(path, "w") as file:
        for name, values, shape in (
            ("prefill_isl", lengths, (2,)),
            ("prefill_ttft_ms", [1e3 * length / rate for length in lengths], (2,)),
            ("decode_active_kv_tokens", held, (_POINTS,)),
            ("decode_context_length", contexts, (_POINTS,)),
            ("decode_itl", gaps, (_POINTS, _POINTS)),
        ):
            file.writestr(f"{name}.npy", _npy(values, shape))


def _steps(first: float, last: float) -> list[float]:
    """Points of equal ratio."""
    return [first * (last / first) ** (number / (_POINTS - 1)) for number in range(_POINTS)]


def _npy(values: Sequence[float], shape: tuple[int, ...]) -> bytes:
    """NumPy's file format, version 1.0: numpy itself is not among our dependencies."""
    head = repr({"descr": "<f8", "fortran_order": False, "shape": shape}).encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    out = io.BytesIO()
    out.write(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head)
    out.write(array.array("d", values).tobytes())
    return out.getvalue()
