"""Answers to many prompts at once equal those to each alone; what prompts share is read once, finished rows leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

from diptych.core.sample import Message
from diptych.core.tokens import drawn
from diptych.parts.backbones import answers
from diptych.parts.backbones.answers import shared_beginnings
from diptych.parts.backbones.base import Backbone, Prefix
from diptych.parts.backbones.causal import KeyValues
from diptych.parts.backbones.internvl import InternVL
from diptych.parts.backbones.processor import Sequences
from diptych.parts.backbones.qwen2_5_vl import Qwen2_5VL
from diptych.parts.backbones.toy_tokenizer import train_tokenizer
from diptych.systems.conversation import answer

TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 330,
    "max_position_embeddings": 128,
}
QUESTIONS = ["how many?", "is there a red circle left of it?", "describe the image.", "two"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = train_tokenizer([*QUESTIONS, "a red circle left of a blue square"] * 3, 320)
    made.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]})
    return made


@pytest.fixture(scope="module", params=["internvl", "qwen2_5_vl"])
def backbone(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Backbone:
    """One whose positions count tokens, and one whose images stand in a grid."""
    torch.manual_seed(0)
    built: Backbone
    if request.param == "internvl":
        vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
        built = InternVL.from_config(
            {
                "vision_config": {**vision, "image_size": 32, "patch_size": 4},
                "text_config": {"model_type": "qwen2", "pad_token_id": 0, "eos_token_id": 2, **TEXT},
                "image_token_id": 5,
                "image_seq_length": 16,
                "downsample_ratio": 0.5,
            },
            tokenizer,
        )
    else:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
        vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48}
        built = Qwen2_5VL.from_config(
            {
                "image_token_id": tokenizer.get_vocab()["<|image_pad|>"],
                "video_token_id": 329,
                "tie_word_embeddings": False,
                "text_config": {**TEXT, "rope_parameters": rope},
                "vision_config": {**vision, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [0]},
            },
            tokenizer,
            Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024),
        )
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return built.eval().requires_grad_(False)


def picture(seed: int) -> Tensor:
    return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def asked(images: int) -> tuple[list[list[Message]], list[list[Tensor]]]:
    """Every question about each of so many images, and one without an image."""
    talks = [[Message(role="user", text=f"<image>\n{question}")] for question in QUESTIONS]
    shown = [[picture(seed)] for seed in range(images) for _ in QUESTIONS]
    return [*talks * images, [Message(role="user", text="two")]], [*shown, []]


class Runs:
    """What a backbone runs: (rows, tokens) of each run."""

    def __init__(self, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, int]] = []
        run = backbone.run

        def counted(embeddings: Tensor, *arguments: Any, **options: Any) -> Prefix:
            self.shapes.append((embeddings.shape[0], embeddings.shape[1]))
            return run(embeddings, *arguments, **options)

        monkeypatch.setattr(backbone, "run", counted)


def test_together_as_alone(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine prompts about two images, drawn with numbers of their own: the texts of each by itself. The images are
    read once each, by the tower and by the language model."""
    talks, images = asked(2)
    uniform = torch.rand(len(talks), 12, generator=torch.Generator().manual_seed(1))
    alone = [
        answer(backbone, [talk], [shown], 12, drawn(1.0, uniform[row : row + 1]))[0]
        for row, (talk, shown) in enumerate(zip(talks, images, strict=True))
    ]
    assert len(set(alone)) > 4

    seen: list[int] = []
    tower = backbone.vision_tokens

    def counted(pictures: Sequence[Tensor]) -> list[Tensor]:
        seen.append(len(pictures))
        return tower(pictures)

    monkeypatch.setattr(backbone, "vision_tokens", counted)
    runs = Runs(backbone, monkeypatch)
    assert answer(backbone, talks, images, 12, drawn(1.0, uniform)) == alone
    assert seen == [2]
    assert runs.shapes[0][0] == 3, "two images and the prompt without one begin differently"
    assert runs.shapes[1][0] == 9
    assert runs.shapes[1][1] < runs.shapes[0][1], "what follows an image is shorter than what begins with it"


def test_images_that_differ_are_not_shared(backbone: Backbone) -> None:
    """The same question about unlike images: no prompt takes another's beginning."""
    talks = [[Message(role="user", text="<image>\nhow many?")]] * 4
    images = [[picture(seed)] for seed in range(4)]
    sequences = backbone.tokenize(talks, images=images, generate=True)
    vision = backbone.vision_tokens([image for row in images for image in row])
    assert shared_beginnings(backbone.place(backbone.embed(sequences.ids), sequences.images, vision), sequences) is None


def test_finished_rows_leave(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 0-5 end at once, 6 and 7 after four tokens and ten: the runs shrink, and the texts stay what they were."""
    talks, images = asked(2)
    talks, images = talks[:8], images[:8]
    ends = torch.tensor([0, 0, 0, 0, 0, 0, 4, 10])
    assert isinstance(backbone, InternVL | Qwen2_5VL)
    chat = backbone.chat
    stop = min(chat.end_ids)

    def choose(logits: Tensor, step: int) -> Tensor:
        logits = logits.clone()
        logits[:, list(chat.end_ids)] = -1e9
        return torch.where(step >= ends[: len(logits)], stop, logits.argmax(-1))

    runs = Runs(backbone, monkeypatch)
    together = answer(backbone, talks, images, 20, choose)
    monkeypatch.setattr(answers, "WORTH_LEAVING", 0.0)
    assert answer(backbone, talks, images, 20, choose) == together
    assert together[:6] == [""] * 6
    assert [rows for rows, tokens in runs.shapes if tokens == 1][:10] == [2] * 4 + [1] * 6


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=7))
@settings(max_examples=40, deadline=None)
def test_what_is_shared_is_equal(rows: list[list[int]]) -> None:
    """Of any prompts: each group's first tokens are the same in all its rows, each row keeps a token to itself."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [9] * (length - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    sequences = Sequences(ids=ids, mask=mask, images=mask & False, loss_mask=mask & False)
    shared = shared_beginnings(torch.nn.functional.one_hot(ids, 10).float(), sequences)
    if shared is None:
        return
    for row, group in zip(rows, shared.group, strict=True):
        count = shared.lengths[group]
        assert 0 < count < len(row)
        assert row[:count] == rows[shared.first[group]][:count]


def test_growing_in_place_leaves_what_others_continue(backbone: Backbone) -> None:
    """Two runs that continue the same keys and values, a token at a time, each get what they get alone."""
    torch.manual_seed(1)
    start, first, second = (torch.randn(2, length, 48) for length in (3, 4, 4))
    real = torch.ones(2, 3, dtype=torch.bool)

    def walk(state: Prefix, tokens: Tensor) -> Prefix:
        for place in range(tokens.shape[1]):
            state = backbone.run(tokens[:, place : place + 1], real[:, :1], state, cache=True)
        return state

    with torch.no_grad():
        whole = [
            backbone.run(torch.cat([start, tokens], 1), torch.ones(2, 7, dtype=torch.bool)).hidden[:, -1:]
            for tokens in (first, second)
        ]
        begun = walk(backbone.run(start, real, cache=True), start[:, :0])
        once = walk(begun, first[:, :2])
        pairs = [
            (walk(once, first[:, 2:]), whole[0]),  # goes on in place
            (walk(begun, second), whole[1]),  # continues what was continued already
            (walk(once, first[:, 2:]), whole[0]),  # again
        ]
    for state, expected in pairs:
        torch.testing.assert_close(state.hidden, expected, rtol=0, atol=1e-5)
        assert isinstance(state.cache, KeyValues)
        assert state.cache.mask.shape == (2, 7)


def test_keys_and_values_are_not_moved_at_each_token(backbone: Backbone) -> None:
    """The memory of the first token after a prompt serves those behind it."""
    with torch.no_grad():
        state = backbone.run(torch.randn(1, 3, 48), torch.ones(1, 3, dtype=torch.bool), cache=True)
        places: list[int] = []
        for _ in range(6):
            state = backbone.run(torch.randn(1, 1, 48), torch.ones(1, 1, dtype=torch.bool), state, cache=True)
            places.append(state.cache.layers[0][0].data_ptr())
    assert len(set(places)) == 1
