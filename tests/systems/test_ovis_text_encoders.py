"""Ovis-U1's decoder behind T5 and CLIP (table 9's baseline) and behind CLIP's vector alone (V1, V2)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextModel, T5EncoderModel

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.sample import Batch, Message, Sample
from diptych.parts.backbones.t5 import T5
from diptych.parts.backbones.toy_tokenizer import train_tokenizer
from diptych.parts.conditioners.clip_text import ClipText
from diptych.recipes import recipe as recipes
from diptych.recipes.build import build_system
from diptych.recipes.families.ovis_u1 import OvisU1
from diptych.recipes.load import load_system
from diptych.recipes.recipe import parse
from diptych.recipes.run import train_recipe
from diptych.systems.composed import ComposedSystem

T5_SIZES = {
    "vocab_size": 320, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
CLIP_SIZES = {
    "vocab_size": 320, "hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16, "eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both encoders as a pipeline of diffusers lays them out."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a red circle", "two blue squares"], 320)
    T5.from_config(T5_SIZES, None).encoder.save_pretrained(folder / "text_encoder_2")
    ClipText.from_config(CLIP_SIZES).model.save_pretrained(folder / "text_encoder")
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer.save_pretrained(str(folder / name))
    return folder


@pytest.fixture(scope="module")
def plain(encoders: Path) -> dict[str, Any]:
    config = {"channels": 3, "patch": 8, "hidden": 32, "heads": 2, "double": 1, "single": 1, "axes": [4, 6, 6]}
    pairs = {"kind": "toyworld", "task": "text_to_image", "count": 16}
    return {
        "system": {
            "kind": "ovis_u1",
            "blank": False,
            "layers": 1,
            "prompts": {"text_to_image": "{text}", "null": ""},
            "backbone": {"kind": "t5", "weights": str(encoders), "subfolder": "text_encoder_2"},
            "pooler": {"kind": "clip_text", "weights": str(encoders), "subfolder": "text_encoder"},
            "refiner": {"kind": "token_refiner", "config": {"pool": "none"}},
            "decoder": {"kind": "ovis_u1", "config": {**config, "pooled_width": 20}},
            "autoencoder": {"kind": "pixel"},
        },
        "sampling": {"size": [32, 32], "steps": 2},
        "run": {"log_every": 1, "save_every": 0, "validate_every": 0, "device": "cpu", "tensorboard": False},
        "stages": {
            "pairs": {
                "train": ["refiner", "decoder"],
                "steps": 2,
                "batch_size": 4,
                "data": {"size": 32, "sources": {"pairs": pairs}},
            }
        },
    }


@torch.no_grad()
def test_states_and_vector_are_those_of_transformers(encoders: Path) -> None:
    """Each text by itself, whatever it is padded to beside others."""
    t5, clip = (
        T5.from_pretrained(encoders / "text_encoder_2").eval(),
        ClipText.from_pretrained(encoders / "text_encoder"),
    )
    texts = ["a red circle", "two blue squares left of a red circle"]
    sequences = t5.tokenize([[Message(role="user", text=text)] for text in texts])
    states = t5.run(t5.embed(sequences.ids), sequences.mask, layers=2).hidden.chunk(2, dim=-1)
    words = clip.tokens.pad([clip.tokens(text) for text in texts])
    plain_t5 = T5EncoderModel.from_pretrained(encoders / "text_encoder_2").eval()
    plain_clip = CLIPTextModel.from_pretrained(encoders / "text_encoder").eval()
    for row, text in enumerate(texts):
        ids = t5.tokenizer([text], return_tensors="pt")["input_ids"]
        out = plain_t5(input_ids=ids, output_hidden_states=True)  # type: ignore[arg-type]
        for found, wanted in zip(states, (out.last_hidden_state, out.hidden_states[-2]), strict=True):
            torch.testing.assert_close(found[row, sequences.mask[row]], wanted[0], rtol=1e-5, atol=1e-5)
        wanted = plain_clip(input_ids=ids).pooler_output  # type: ignore[arg-type]
        torch.testing.assert_close(clip(words)[row], wanted[0], rtol=1e-5, atol=1e-5)


def test_it_trains_is_saved_and_comes_back(plain: dict[str, Any], tmp_path: Path) -> None:
    assert train_recipe(parse(plain), plain, tmp_path / "run")
    system, _ = load_system(str(tmp_path / "run"))
    assert isinstance(system, ComposedSystem)
    assert system.referenced() == ["backbone", "pooler"]
    batch = Batch(tuple(Sample(id=str(i), task="text_to_image", text=text) for i, text in enumerate(("red", "a blue"))))
    condition = system.encode(batch)
    assert condition.pooled is not None
    assert condition.pooled.shape == (2, 20)
    assert not torch.equal(condition.pooled[0], condition.pooled[1])
    terms = system.losses(
        system.prepare(Batch(tuple(recipes_samples())), Draws([0, 1])), Draws([0, 1])
    )  # both are encoders alone: no gradient goes into them
    terms["flow.text_to_image"].sum().backward()


def recipes_samples() -> list[Sample]:
    image = torch.zeros(3, 32, 32)
    return [Sample(id=str(i), task="text_to_image", text="a red circle", image=image) for i in range(2)]


def test_what_it_cannot_do_is_one_line(plain: dict[str, Any], tmp_path: Path) -> None:
    system = build_system(parse(plain).system)
    image = torch.zeros(3, 32, 32)
    edit = Sample(id="e", task="edit", text="more red", context_images=(image,))
    with pytest.raises(UserError, match="T5 sees no images"):
        system.encode(Batch((edit,)))
    with pytest.raises(UserError, match="T5 answers nothing"):
        system.generate_text([[Message(role="user", text="hello")]], [[]])
    with pytest.raises(UserError, match="KL autoencoder"):
        OvisU1().to_release(system, tmp_path / "never")
    for change, words in (
        ({"pooler": None}, "one vector for the whole prompt"),
        ({"refiner": {"kind": "token_refiner"}}, "one vector for the whole prompt"),
        ({"blank": True}, "blank: T5 sees no images"),
        ({"pack": 64}, "pack: packed rows need an MLLM that reads them"),
        ({"pooler": {"kind": "clip_text", "config": CLIP_SIZES}}, "needs `weights`"),
        ({"pooler": {**plain["system"]["pooler"], "subfolder": "text_encoder_2"}}, "a 't5' model"),
    ):
        with pytest.raises(UserError, match=words):
            build_system(parse({**plain, "system": {**plain["system"], **change}}).system)


def test_the_variants_of_table_9_differ_as_it_says() -> None:
    found = {}
    for name in ("t5_clip", "last_layer", "two_layers", "averaged", "cls"):
        recipe = recipes.load(f"ovis_u1/ablation/{name}")[0]
        system = build_system(recipe.system, meta=True)
        assert isinstance(system, ComposedSystem)
        found[name] = (
            recipe.system.backbone.kind,  # type: ignore[attr-defined]
            system.settings.layers,
            system.refiner.config.pool,
            system.refiner.config.context_width,
            system.pooler is not None,
        )
        assert list(recipe.stages) == ["stage0_decoder"]
        json.dumps(system.config())
    assert found == {
        "t5_clip": ("t5", 1, "none", 4096, True),
        "last_layer": ("ovis", 1, "none", 1536, True),
        "two_layers": ("ovis", 2, "none", 3072, True),
        "averaged": ("ovis", 2, "average", 3072, False),
        "cls": ("ovis", 2, "cls", 3072, False),
    }
