"""LoRA and QLoRA of every system: trained through recipes, saved, read by PEFT itself and by us."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from torch import nn

import diptych
from diptych.checkpoints.lora_files import write_peft
from diptych.core.errors import UserError
from diptych.parts.added_lora import trained
from diptych.parts.lora import adapted_module, add_lora, lora_config
from diptych.recipes.load import load_system, start
from diptych.recipes.lora import add
from diptych.recipes.plain import load_plain
from diptych.recipes.recipe import parse

LLM = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "rslora": True, "targets": ["q_proj", "v_proj"]}
HOMES = {
    "toy/bagel": "network",
    "toy/ovis_u1": "backbone",
    "toy/omnigen2": "backbone",
    "toy/iomm_finetune_mix": "backbone",
}
STARTS = {"toy/ovis_u1": "toy/ovis-u1", "toy/iomm_finetune_mix": "toy/iomm"}


def recipe_of(base: str, lora: dict[str, Any] | None, **part: Any) -> dict[str, Any]:
    """A short run of a shipped model with adapters on its language model, as plain values."""
    plain = load_plain(base)
    home = plain["system"][HOMES[base]]
    if lora is not None:
        home["lora"] = dict(lora)
    home |= part
    stage = copy.deepcopy(next(iter(plain["stages"].values())))
    sources = {"pairs": {"kind": "toyworld", "task": "text_to_image", "count": 8}}
    sources |= {"questions": {"kind": "toyworld", "task": "understand", "count": 8}}
    stage |= {"train": ["lora"], "steps": 2, "batch_size": 4, "settings": {}, "ema_decay": None}
    stage |= {"data": {"size": 32, "held_out": 0, "sources": sources}, "optimizer": {"lr": 0.01}, "loss_weights": {}}
    stage.pop("micro_batch_size", None)
    plain["stages"] = {"tune": stage}
    plain["start"] = STARTS.get(base, base)
    plain["run"] = {"device": "cpu", "tensorboard": False, "save_every": 0, "validate_every": 0}
    plain["sample_prompts"] = []
    return plain


def train(plain: dict[str, Any], folder: Path) -> Path:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(plain))
    assert diptych.train(str(file), out=folder / "run")
    return folder / "run"


def home_of(system: Any) -> nn.Module:
    return system.network.llm if hasattr(system, "network") else system.backbone


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21 on transformers 5.23
@pytest.mark.parametrize("base", list(HOMES))
def test_a_language_models_lora_is_trained_and_read_by_peft_and_by_us(base: str, tmp_path: Path) -> None:
    run = train(recipe_of(base, LLM), tmp_path)
    system, _ = load_system(str(run))
    part = home_of(system)
    module = adapted_module(part).eval()
    adapters = {name: p for name, p in module.named_parameters() if ".lora_" in name}
    assert adapters
    assert not any("vision" in name for name in adapters)
    assert any(p.abs().max() > 0 for name, p in adapters.items() if "lora_B" in name), "they have learned"
    assert lora_config(module).use_rslora  # pyright: ignore[reportOptionalMemberAccess]
    write_peft(tmp_path / "adapter", {name: (x.down, x.up, x.alpha) for name, x in trained(module).items()})

    # The plain model that it started from, with the adapter by PEFT itself, and by us.
    source, _ = load_system(STARTS.get(base, base))
    plain_module = adapted_module(home_of(source))
    theirs = PeftModel.from_pretrained(copy.deepcopy(plain_module), str(tmp_path / "adapter")).eval()
    assert add(source, [str(tmp_path / "adapter")])
    ours = adapted_module(home_of(source)).eval()
    for name in trained(module):
        x = torch.randn(3, module.get_submodule(name).in_features)  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            want = module.get_submodule(name)(x)
            torch.testing.assert_close(ours.get_submodule(name)(x), want)
            torch.testing.assert_close(theirs.base_model.model.get_submodule(name)(x), want)  # pyright: ignore
            assert not torch.allclose(ours.get_submodule(name).base(x), want)  # pyright: ignore


def test_the_saved_model_answers_with_its_adapters(tmp_path: Path) -> None:
    run = train(recipe_of("toy/omnigen2", LLM), tmp_path)
    tuned, plain = diptych.load(str(run), device="cpu"), diptych.load("toy/omnigen2", device="cpu")
    again = diptych.load(str(tuned.save_pretrained(tmp_path / "again")), device="cpu")
    images = [model.generate("a red circle", steps=2, output_type="pt")[0] for model in (tuned, again, plain)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_qlora_trains_on_quantised_weights_and_is_saved_whole(format: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plain = recipe_of("toy/omnigen2", LLM, quantize=format)
    system: Any = start(parse(plain), quantized=True)
    layers = [type(layer).__name__ for layer in system.backbone.modules() if "Linear" in type(layer).__name__]
    assert {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[format] in layers
    adapters = [p for name, p in system.named_parameters() if ".lora_" in name]
    assert {p.dtype for p in adapters} == {torch.float32}
    run = train(plain, tmp_path)
    saved, _ = load_system(str(run))
    source, _ = load_system("toy/omnigen2")
    weights = dict(saved.named_parameters())
    for name, value in source.named_parameters():
        adapted = name.rpartition(".")[0] + ".base_layer." + name.rpartition(".")[2]
        assert torch.equal(weights.get(name, weights.get(adapted)), value), "the base is as it was, in full"
    assert any(p.abs().max() > 0 for name, p in weights.items() if "lora_B" in name)


def test_adapters_on_a_bfloat16_model_are_float32() -> None:
    system, _ = load_system("toy/omnigen2")
    backbone: Any = system.backbone  # pyright: ignore[reportAttributeAccessIssue]
    backbone.to(torch.bfloat16)
    add_lora(backbone, **LLM)
    assert {p.dtype for n, p in backbone.named_parameters() if ".lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in backbone.named_parameters() if ".lora_" not in n} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": "eight"}, "system.backbone.lora.rank: needs a whole number"),
        ({"rank": 0}, "system.backbone.lora: rank must be at least 1"),
        ({"alpha": -1}, "system.backbone.lora: alpha must be above 0"),
        ({"dropout": 1.5}, "system.backbone.lora: dropout must be"),
        ({"targets": "q_proj"}, "system.backbone.lora.targets: needs a list"),
        ({"targets": []}, "system.backbone.lora: targets names no layer"),
        ({"rslora": "maybe"}, "system.backbone.lora.rslora: needs true or false"),
        ({"ranks": 4}, "system.backbone.lora: unknown key 'ranks'. Did you mean 'rank'"),
    ],
)
def test_wrong_keys_end_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as told:
        parse(recipe_of("toy/omnigen2", {**LLM, **changes}))
    assert message in str(told.value)


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown LoRA target 'q_porj'\. Did you mean 'q_proj'"):
        start(parse(recipe_of("toy/omnigen2", {**LLM, "targets": ["q_porj"]})))
    pytest.importorskip("bitsandbytes")
    plain = recipe_of("toy/omnigen2", LLM, quantize="nf4")
    plain["stages"]["tune"]["train"] = ["lora", "llm"]
    with pytest.raises(UserError, match=r"stages.tune.train: 'llm' is quantised \(backbone.quantize: nf4\) and cannot"):
        start(parse(plain), quantized=True)
    plain = recipe_of("toy/omnigen2", None)
    plain["system"]["autoencoder"]["lora"] = LLM
    with pytest.raises(UserError, match="autoencoder: lora is for a decoder, a backbone, or BAGEL's network"):
        start(parse(plain))
