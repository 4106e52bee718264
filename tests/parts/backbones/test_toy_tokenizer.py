"""The toy tokenizer writes any text, knows frequent words whole, and survives its files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from diptych.core.errors import UserError
from diptych.parts.backbones.toy_tokenizer import SPECIAL, train_tokenizer

TEXTS = [
    "a red circle at the top left and a blue square at the bottom right on a gray background",
    "how many triangles are there?",
    "is there a green cross?",
    "three",
    "yes",
]
TOKENIZER = train_tokenizer(TEXTS)


def test_words_are_one_token() -> None:
    for text in TEXTS:
        words = text.replace("?", " ?").split()
        assert len(TOKENIZER(text)["input_ids"]) == len(words)
    for word in ("circle", " circle", " three", "blue", "assistant", "user"):
        assert len(TOKENIZER(word)["input_ids"]) == 1, word


def test_special_tokens() -> None:
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL)) == list(range(6))
    assert TOKENIZER("".join(SPECIAL))["input_ids"] == list(range(6))
    assert (TOKENIZER.pad_token, TOKENIZER.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert TOKENIZER.decode([1, 2], skip_special_tokens=True) == ""
    assert len(TOKENIZER) <= 512


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives(text: str) -> None:
    if not any(token in text for token in SPECIAL):
        assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_deterministic_and_saved_whole(tmp_path: Path) -> None:
    again = train_tokenizer(iter(TEXTS))
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "Ein Würfel, 立方体 <img></img><|im_end|>\n", "a redcircle  squares"):
        assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    turn = [{"role": "user", "content": "three"}]
    expected = "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    assert loaded.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) == expected


def test_small_vocabularies() -> None:
    assert len(train_tokenizer(TEXTS, 270)) == 270
    with pytest.raises(UserError, match="vocab_size 200: at least 265"):
        train_tokenizer(TEXTS, 200)
