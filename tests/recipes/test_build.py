from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.checkpoints.tensors import read_tensors, weight_files
from diptych.core.errors import UserError
from diptych.parts.autoencoders.base import Autoencoder
from diptych.parts.backbones.base import Backbone
from diptych.parts.conditioners.base import Conditioner, Connector
from diptych.parts.conditioners.clip_text import ClipText
from diptych.parts.conditioners.token_refiner import TokenRefiner
from diptych.parts.decoders.base import Decoder
from diptych.recipes import build
from diptych.recipes.build import build_system
from diptych.recipes.load import start
from diptych.recipes.model import Model
from diptych.recipes.names import locate
from diptych.recipes.plain import load_plain
from diptych.recipes.recipe import Part, parse
from diptych.recipes.run import check_parts, save_model
from diptych.recipes.tables import choose
from diptych.systems.composed import ComposedSystem


@pytest.mark.parametrize("kind", ["metaquery", "residual_query_adapter"])
def test_queries_start_as_words(kind: str) -> None:
    backbone = build.build_backbone(Part(kind="internvl", weights="toy/mllm"), False, None)[0]
    config = {"queries": 3, "init_text": "top left color", **({"heads": 4} if kind != "metaquery" else {})}
    conditioner, origin = build.build_conditioner(Part(kind=kind, config=config), backbone, False)
    ids = torch.tensor([backbone.tokenizer("top left color")["input_ids"]])
    prompt = torch.randn(1, 5, backbone.width)
    found = conditioner(prompt, torch.ones(1, 5, dtype=torch.bool))
    assert torch.allclose(found, backbone.embed(ids))  # an untrained adapter gives its queries
    assert origin["config"]["width"] == backbone.width
    with pytest.raises(UserError, match="init_text is 2 tokens, for 3 queries"):
        build.build_conditioner(Part(kind=kind, config={**config, "init_text": "top left"}), backbone, False)


def test_decoder_of_a_saved_model() -> None:
    """A new system may begin with the decoder that another one learned; its sizes come with it."""
    part = Part(kind="mmdit", weights="toy/iomm-pretrained")
    decoder, origin = build.build_decoder(part, 128, False)
    saved = dict(read_tensors(weight_files(locate("toy/iomm-pretrained"))))
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, saved[f"decoder.{name}"].float()), name
    again = build.build_decoder(Part(**origin), 128, False)[0]  # the configuration of a saved folder has the sizes too
    assert again.state_dict().keys() == decoder.state_dict().keys()
    assert all(value.is_meta for value in build.build_decoder(part, 128, True)[0].state_dict().values())


def test_conditioner_of_a_saved_model() -> None:
    """Its queries are those that were learned. Mutant: they start as the words of `init_text` once more."""
    backbone, _ = build.build_backbone(Part(kind="internvl", weights="toy/mllm"), False, None)
    part = Part(kind="residual_query_adapter", weights="toy/iomm")
    conditioner, _ = build.build_conditioner(part, backbone, False)
    saved = dict(read_tensors(weight_files(locate("toy/iomm"))))
    for name, value in conditioner.state_dict().items():
        assert torch.equal(value, saved[f"conditioner.{name}"].float()), name


@pytest.mark.parametrize(
    ("part", "line"),
    [
        (
            Part(kind="ovis_u1", weights="toy/iomm"),
            "toy/iomm is not a saved model that holds a decoder of kind ovis_u1",
        ),
        (
            Part(kind="mmdit", weights="toy/mllm"),
            "toy/mllm: no MMDiT is published; 'weights' names a saved Diptych model that has one",
        ),
        (Part(kind="mmdit", weights="toy/iomm", config={"hidden": 96}), "decoder.config.hidden: 96, but .* has 160"),
    ],
)
def test_decoder_that_a_model_lacks(part: Part, line: str) -> None:
    with pytest.raises(UserError, match=line):
        build.build_decoder(part, 128, False)


def test_backbone_of_a_saved_model(tmp_path: Path) -> None:
    """A new system may begin with the MLLM that another one trained; it is saved with the new one, as its tokenizer."""
    part = Part(kind="ovis", weights="toy/ovis-u1")
    backbone, origin = build.build_backbone(part, False, None)
    saved = dict(read_tensors(weight_files(locate("toy/ovis-u1"))))
    for name, value in backbone.named_parameters():  # each tied weight once, as in the file
        assert torch.equal(value, saved[f"backbone.{name}"].float()), name
    assert all(value.is_meta for value in build.build_backbone(part, True, None)[0].state_dict().values())
    assert origin["weights"] is None

    plain = load_plain("toy/ovis_u1")
    plain["system"] |= {"backbone": {"kind": "ovis", "weights": "toy/ovis-u1"}, "layers": 1}
    recipe = parse(plain, "r")
    save_model(build_system(recipe.system), recipe, tmp_path / "new")
    (tmp_path / "moved").mkdir()
    new = Model.from_pretrained(str((tmp_path / "new").rename(tmp_path / "moved" / "new"))).system
    assert isinstance(new, ComposedSystem)
    for name, value in new.named_parts()["llm"].state_dict().items():
        assert torch.equal(value, backbone.named_parts()["llm"].state_dict()[name]), name
    text = "a red circle left of a blue square"
    assert new.backbone.tokenizer.encode(text) == backbone.tokenizer.encode(text)


def test_backbones_that_a_model_lacks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="backbone: toy/iomm holds none; its backbone is that of toy/mllm"):
        build.build_backbone(Part(kind="internvl", weights="toy/iomm"), False, None)
    with pytest.raises(UserError, match="toy/bagel is not a saved model that holds a backbone of kind ovis"):
        build.build_backbone(Part(kind="ovis", weights="toy/bagel"), False, None)
    with pytest.raises(UserError, match=r"backbone.tokenizer: toyworld, but the backbone of toy/ovis-u1 brings"):
        build.build_backbone(Part(kind="ovis", weights="toy/ovis-u1", tokenizer="toyworld"), False, None)
    narrow = Part(kind="ovis", weights="toy/ovis-u1", config={"llm": {"num_hidden_layers": 5, "hidden_size": 96}})
    with pytest.raises(
        UserError, match=r"backbone.config.llm.hidden_size: 96, but the backbone of toy/ovis-u1 has 128"
    ):
        build.build_backbone(narrow, True, None)
    plain, lora = load_plain("toy/ovis_u1"), {"rank": 2, "alpha": 4, "targets": ["q_proj"]}
    plain["system"]["backbone"] = {"kind": "ovis", "weights": "toy/ovis-u1", "lora": lora}
    recipe = parse(plain, "r")
    save_model(build_system(recipe.system), recipe, tmp_path / "lora")
    folder = str(tmp_path / "lora")
    with pytest.raises(UserError, match=f"that of {folder} has LoRA adapters; merge them first, diptych lora merge"):
        build.build_backbone(Part(kind="ovis", weights=folder), False, None)


TABLES = {
    "backbones": (build.BACKBONES, Backbone),
    "conditioners": (build.CONDITIONERS, Conditioner),
    "connectors": (build.CONNECTORS, Connector),
    "decoders": (build.DECODERS, Decoder),
    "autoencoders": (build.AUTOENCODERS, Autoencoder),
    "refiners": (build.REFINERS, TokenRefiner),
    "poolers": (build.POOLERS, ClipText),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_a_table_is_a_class_of_its_interface(name: str) -> None:
    """The tables hold strings, so that only what is built is imported; here they are what a type checker would be."""
    table, base = TABLES[name]
    for kind, place in table.items():
        assert place.startswith("diptych.parts."), place
        cls = choose(name, kind, table, base)
        assert not inspect.isabstract(cls), place
        for method in ("from_config", "from_pretrained"):
            assert "config" in inspect.signature(getattr(cls, method)).parameters or base is Backbone, place


def test_what_a_random_part_needs_is_said() -> None:
    with pytest.raises(UserError, match="autoencoder: a part needs `weights` or a `config`"):
        build.build_autoencoder(Part(kind="kl"), False)
    with pytest.raises(UserError, match=r"decoder.config: 'channels' is missing"):
        build.build_decoder(Part(kind="mmdit", config={"patch": 2}), 8, False)
    with pytest.raises(UserError, match="connector identity: the MLLM is 8 wide, the decoder takes 9"):
        build.build_connector(Part(kind="identity"), 8, 9, False)


def test_a_mask_token_that_nothing_trains_is_refused(tiny_plain: dict[str, Any]) -> None:
    tiny_plain["system"]["mask_mode"] = "mask_token"
    recipe = parse(tiny_plain)
    system = build_system(recipe.system, meta=True)
    with pytest.raises(UserError, match=r"mask_mode 'mask_token' .* no stage trains it"):
        check_parts(recipe, system)
    stage = next(iter(tiny_plain["stages"].values()))
    stage["train"] = [*stage["train"], "mask_token"]
    check_parts(parse(tiny_plain), system)


def test_what_learns_is_float32_whatever_it_starts_from(
    tiny_plain: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    """Small updates of bfloat16 weights are lost (docs/surprises.md)."""
    half = Model.from_pretrained(str(tiny_model)).save_pretrained(tmp_path / "half", dtype="bfloat16")
    assert {value.dtype for _, value in read_tensors(weight_files(half))} == {torch.bfloat16}
    tiny_plain["start"] = str(half)
    assert {p.dtype for p in start(parse(tiny_plain)).parameters()} == {torch.float32}
