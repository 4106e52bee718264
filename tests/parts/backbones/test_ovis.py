"""Ovis's MLLM against the reference: soft tokens, merged embeddings, conditions, logits, prompts; then packing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from diptych.checkpoints.tensors import load_into
from diptych.core.errors import UserError
from diptych.core.sample import Message
from diptych.objectives.cross_entropy import chosen_token_loss
from diptych.parts.backbones.causal import cut
from diptych.parts.backbones.native_resolution import Pixels, from_levels, pack_images
from diptych.parts.backbones.ovis import Ovis
from diptych.parts.backbones.ovis_chat import OvisChat, padded
from diptych.parts.backbones.packed_rows import first_fit
from diptych.parts.backbones.processor import Sequences
from diptych.parts.backbones.toy_tokenizer import train_tokenizer
from diptych.parts.backbones.visual_tokenizer import IMAGE, expand

GOLDEN = Path(__file__).parents[2] / "golden" / "ovis_u1" / "visual_tokenizer_a.safetensors"
TOKENIZER = train_tokenizer(["two yes"], 320)
CLOSE = {"rtol": 5e-5, "atol": 5e-5}
PILLOW = int(PIL.__version__.partition(".")[0])
"""The reference's pixels were made with Pillow 13."""


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(GOLDEN, framework="pt") as file:
        meta = {key: json.loads(value) for key, value in file.metadata().items()}
        return meta, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def ovis(golden: tuple[dict[str, Any], dict[str, Tensor]]) -> Ovis:
    meta, tensors = golden
    config = meta["config"]
    tokenizer = config["visual_tokenizer_config"]
    vision = {key: value for key, value in tokenizer["backbone_config"].items() if key != "model_type"}
    made = Ovis.from_config(
        {
            "llm": config["llm_config"],
            "vision": vision,
            "visual_vocab_size": tokenizer["vocab_size"],
            "max_length": 256,
        },
        None,
    )
    given = ((key.removeprefix("weights."), x) for key, x in tensors.items() if key.startswith("weights."))
    load_into(made, given, "reference")
    return made.eval()


def grids(tensors: dict[str, Tensor], case: str) -> list[tuple[int, int, int]]:
    return [(f, r, c) for f, r, c in tensors[f"inputs.{case}.grid_thw"].tolist()]


def merged(ovis: Ovis, tensors: dict[str, Tensor], case: str) -> tuple[Sequences, Tensor]:
    """Rows of the reference's ids (its padding left out) with their images placed."""
    shapes = grids(tensors, case)
    tokens = ovis.vte(ovis.visual_tokenizer(tensors[f"inputs.{case}.pixel_values"], shapes))
    waiting = iter(tokens.split([ovis.visual_tokenizer.count(grid) for grid in shapes]))
    rows: list[list[int]] = []
    used: list[Tensor] = []
    for ids, mask in zip(tensors[f"inputs.{case}.input_ids"], tensors[f"inputs.{case}.attention_mask"], strict=True):
        row = ids[mask].tolist()
        mine = [next(waiting) for _ in range(max(row.count(IMAGE), 1))][: row.count(IMAGE)]  # none uses up a dummy
        used += mine
        rows.append(expand(row, [len(one) for one in mine]))
    sequences = padded(rows, [[False] * len(row) for row in rows], 1)
    return sequences, ovis.place(ovis.embed(sequences.ids), sequences.images, used)


@torch.no_grad()
def test_soft_tokens_are_the_references(ovis: Ovis, golden: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    tensors = golden[1]
    found = ovis.visual_tokenizer(tensors["inputs.tok.pixel_values"], grids(tensors, "tok"))
    torch.testing.assert_close(torch.nn.functional.pad(found, (0, 4)), tensors["outputs.tok.tokens"], **CLOSE)
    assert torch.equal(found.argmax(1), tensors["outputs.tok.argmax_ids"])
    torch.testing.assert_close(ovis.vte(found), tensors["outputs.tok.embeds"], **CLOSE)
    indicators = ovis.vte.indicators(torch.tensor([-301, -302, -303, -304]))
    assert torch.equal(indicators, tensors["outputs.tok.indicator_embeds"])


@torch.no_grad()
@pytest.mark.parametrize("pack", [0, 40])
@pytest.mark.parametrize("case", ["single", "batch", "video", "train"])
def test_conditions_are_the_references(
    ovis: Ovis, golden: tuple[dict[str, Any], dict[str, Tensor]], case: str, pack: int
) -> None:
    tensors = golden[1]
    sequences, embeddings = merged(ovis, tensors, case)
    states = ovis.run(embeddings, sequences.mask, layers=2, pack=pack).hidden
    real = tensors[f"steps.{case}.attention_mask"]
    for row, mask in enumerate(sequences.mask):
        wanted = tensors[f"steps.{case}.inputs_embeds"][row][real[row]]
        torch.testing.assert_close(embeddings[row, mask], wanted, **CLOSE)
        if case != "train":
            torch.testing.assert_close(states[row, mask], tensors[f"outputs.{case}.cond"][row][real[row]], **CLOSE)


@torch.no_grad()
def test_a_prompt_cut_to_its_last_tokens_is_the_references(
    ovis: Ovis, golden: tuple[dict[str, Any], dict[str, Tensor]]
) -> None:
    """Case `batch_truncated`: images placed, then at most 12 tokens of each row, an image being cut in two."""
    tensors = golden[1]
    sequences, embeddings = merged(ovis, tensors, "batch_truncated")
    shorter, left = cut(sequences, embeddings, 12, "last")
    real = tensors["outputs.batch_truncated.attention_mask"]
    assert shorter.mask.sum(1).tolist() == real.sum(1).tolist()
    for row, mask in enumerate(shorter.mask):
        wanted = tensors["outputs.batch_truncated.inputs_embeds"][row][real[row]]
        torch.testing.assert_close(left[row, mask], wanted, **CLOSE)
    first, head = cut(sequences, embeddings, 12, "first")
    assert torch.equal(head[first.mask], embeddings[:, :12][first.mask])
    assert torch.equal(first.ids, sequences.ids[:, :12])
    assert cut(sequences, embeddings, 99, "last")[1] is embeddings


@torch.no_grad()
def test_logits_and_loss_are_the_references(ovis: Ovis, golden: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    tensors = golden[1]
    sequences, embeddings = merged(ovis, tensors, "train")
    logits = ovis.logits(ovis.run(embeddings, sequences.mask).hidden)
    real, labels = tensors["steps.train.attention_mask"], tensors["steps.train.labels"]
    rows, places, targets = [], [], []
    for row, mask in enumerate(sequences.mask):
        torch.testing.assert_close(logits[row, mask], tensors["outputs.train.lm_logits"][row][real[row]], **CLOSE)
        for place, label in enumerate(labels[row][real[row]].tolist()):
            if label != -100:
                rows, places, targets = [*rows, row], [*places, place - 1], [*targets, label]
    chosen = logits[torch.tensor(rows), torch.tensor(places)]
    loss = chosen_token_loss(chosen, torch.tensor(targets), torch.zeros(len(rows), dtype=torch.long), 1)
    torch.testing.assert_close(loss[0], tensors["outputs.train.lm_loss"], **CLOSE)


def test_prompts_are_the_references(golden: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    meta, tensors = golden
    chat = OvisChat(train_tokenizer(["<think>a"], 320))
    pixels = {key: meta["config"]["image_processor"][key] for key in ("min_pixels", "max_pixels")}
    image = from_levels(tensors["inputs.prompt.image"].numpy())
    for case, (text, preface) in meta["prompt_cases"].items():
        messages = [Message(role="user", text=text)]
        assert chat.render(messages, generate=preface is not None) == meta["prompt_strings"][case]
        count = text.count("<image>")
        patches, shapes = pack_images([image] * count, Pixels(patch=4, merge=2, **pixels))
        expected = tensors[f"outputs.prompt.{case}.pixel_values"]
        if PILLOW >= 13:
            torch.testing.assert_close(patches, expected, **CLOSE)
        else:  # Pillow 12 rounds otherwise where one side of an image grows and the other shrinks
            assert (patches - expected).abs().mean() < 0.02
        assert [list(shape) for shape in shapes] == tensors[f"outputs.prompt.{case}.grid_thw"].tolist()
        slots = [3] * count
        encoded = chat.encode([messages], [slots], generate=preface is not None, max_length=256)
        row = encoded.ids[0].tolist()
        wanted = [id for id in tensors[f"outputs.prompt.{case}.input_ids"].tolist() if id < 0]
        assert [id for id in row if id < 0] == expand(wanted, slots)


def test_learned_tokens_are_the_answers_and_their_end() -> None:
    tokenizer = train_tokenizer(["two yes"], 320)
    chat = OvisChat(tokenizer, preface="")
    talk = [
        Message(role="user", text="<image> and <image>?"),
        Message(role="assistant", text="two"),
        Message(role="user", text="sure?"),
        Message(role="assistant", text="yes"),
    ]
    encoded = chat.encode([talk, talk[:2]], [[2, 1], [1, 1]], generate=False, max_length=64)
    learned = encoded.ids[0][encoded.loss_mask[0]].tolist()
    assert tokenizer.decode(learned) == "two<|im_end|>yes<|im_end|>"
    assert encoded.images.sum(1).tolist() == [3, 2]
    assert not (encoded.loss_mask & encoded.images).any()
    with pytest.raises(UserError, match="2 <image> placeholders but 1 images"):
        chat.encode([talk[:1]], [[1]], generate=True, max_length=64)
    with pytest.raises(UserError, match="reserved token"):
        chat.encode([[Message(role="user", text="<|im_end|>")]], [[]], generate=True, max_length=64)
    with pytest.raises(UserError, match="would be cut"):
        chat.encode([talk], [[40, 40]], generate=False, max_length=64)


def test_saved_by_itself_it_comes_back(ovis: Ovis, tmp_path: Path) -> None:
    made = Ovis.from_config(
        {**ovis.plain_config(), "llm": {**ovis.plain_config()["llm"], "vocab_size": 320}}, TOKENIZER
    )
    made.save_pretrained(tmp_path)
    back = Ovis.from_pretrained(tmp_path)
    one, two = made.state_dict(), back.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "visual_vocab_size": 30}))
    with pytest.raises(UserError, match="do not fit"):
        Ovis.from_pretrained(tmp_path)


def test_bins_hold_their_tokens() -> None:
    bins = first_fit([5, 9, 3, 1, 20], 10)
    assert sorted(row for one in bins for row in one) == [0, 1, 2, 3, 4]
    assert [4] in bins  # longer than a bin: alone
    assert len(bins) == 3


def test_config_errors_name_the_key(ovis: Ovis) -> None:
    config = ovis.plain_config()
    for change, words in (
        ({"visual_vocab_sise": 3}, "'visual_vocab_size'"),
        ({"visual_vocab_size": 3}, "at least 5"),
        ({"vision": {**config["vision"], "patch": 4}}, "patch_size"),
        ({"llm": {**config["llm"], "hiden_size": 4}}, "hidden_size"),
    ):
        with pytest.raises(UserError, match=words):
            Ovis.from_config({**config, **change}, None)
