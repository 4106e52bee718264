"""What several tests start from, made once for all workers of a test run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` has filled; the first worker that asks for it makes it, and the others wait.

    Nobody may change what lies in it. A folder that `make` did not finish is made again elsewhere.
    """
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    mark = base / f"{name}.made"
    with FileLock(base / f"{name}.lock"):
        if not mark.is_file():
            folder = factory.mktemp(name)
            make(folder)
            mark.write_text(str(folder))
    return Path(mark.read_text())


def make_clip(folder: Path) -> None:
    """A tiny CLIP of transformers with random weights, and a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {
        **size,
        "vocab_size": 64,
        "max_position_embeddings": 16,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "pad_token_id": 1,
    }
    vision = {**size, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    words = ["a", "photo", "of", "red", "green", "blue", "white", "object", "bench", "clock", "cow", "two"]
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(  # CLIP reads a text at its end, which padding must not move
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
