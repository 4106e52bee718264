"""LoRA added to models, merged, extracted and exchanged, from Python and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

import diptych
import tiny_sizes
from diptych.checkpoints.lora_files import FORMATS
from diptych.cli.main import main
from diptych.core.errors import UserError
from diptych.inference.engine import Engine
from diptych.parts.decoders.sana import Sana
from diptych.parts.lora import add_lora
from diptych.recipes import lora
from diptych.recipes.from_model import with_system
from diptych.recipes.load import load_system
from diptych.recipes.recipe import parse
from diptych.recipes.run import train_recipe
from diptych.systems.base import AssembledSystem

TARGETS = {"toy/omnigen2": ("to_q", "to_out.0"), "toy/bagel": ("und.q_proj", "gen.q_proj"), "toy/iomm": ("qkv",)}


def draw(engine: Engine) -> Tensor:
    return engine.generate("a red circle", steps=2, prompt_expansion=0, output_type="pt")[0]


def tuned(name: str, part: str | None = None) -> Engine:
    """A model with random adapters, of a scale that is not 1."""
    model = diptych.load(name, device="cpu")
    torch.manual_seed(0)
    for home, module in lora.homes(model.system).items():
        if part in (None, home):
            linear = {
                key.rpartition(".")[2]: key for key, child in module.named_modules() if isinstance(child, nn.Linear)
            }
            names = [each for each in TARGETS[name] if any(key.endswith(each) for key in linear.values())]
            add_lora(module, rank=3, alpha=7.0, dropout=0.0, targets=names or ["q_proj"])
            for key, parameter in module.named_parameters():
                if ".lora_" in key:
                    nn.init.normal_(parameter, std=0.1)
    return Engine(model.system, model.sampling, name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT folders of toy OmniGen2's decoder and of toy BAGEL."""
    place = tmp_path_factory.mktemp("lora")
    for name, part in (("toy/omnigen2", "decoder"), ("toy/bagel", "llm")):
        system = tuned(name, part).system
        lora.write(system, lora.of_model(system), place / name.replace("/", "-"), "peft")
    return place


@pytest.mark.parametrize("name", ["toy/omnigen2", "toy/bagel"])
def test_a_lora_is_added_with_its_scale_and_merged_to_the_same_picture(name: str, tmp_path: Path) -> None:
    engine = tuned(name)
    wanted, plain = draw(engine), draw(diptych.load(name, device="cpu"))
    lora.write(engine.system, lora.of_model(engine.system), tmp_path / "peft", "peft")
    model = diptych.load(name, device="cpu", lora=str(tmp_path / "peft"))
    torch.testing.assert_close(draw(model), wanted, atol=1e-4, rtol=0)
    assert not torch.allclose(wanted, plain, atol=1e-2)
    off = diptych.load(name, device="cpu", lora=(str(tmp_path / "peft"), 0.0))
    torch.testing.assert_close(draw(off), plain)
    both = diptych.load(name, device="cpu", lora=[f"{tmp_path}/peft:0.25", (str(tmp_path / "peft"), 0.75)])
    torch.testing.assert_close(draw(both), wanted, atol=1e-4, rtol=0)
    assert both.lora == [f"{tmp_path}/peft:0.25", f"{tmp_path}/peft:0.75"]
    with pytest.raises(UserError, match="has LoRA beside its weights"):
        both.save_pretrained(tmp_path / "no")

    lora.save_merged(name, [str(tmp_path / "peft")], tmp_path / "merged")
    system, _ = load_system(str(tmp_path / "merged"))
    assert not any(".lora_" in key for key in system.state_dict())
    merged = diptych.load(str(tmp_path / "merged"), device="cpu")
    torch.testing.assert_close(draw(merged), wanted, atol=1e-4, rtol=0)
    files, left = lora.extract(name, str(tmp_path / "merged"), tmp_path / "extracted", 3)
    assert left < 1e-4
    assert files
    again = diptych.load(name, device="cpu", lora=str(tmp_path / "extracted"))
    torch.testing.assert_close(draw(again), wanted, atol=1e-4, rtol=0)
    _, left = lora.extract(name, str(tmp_path / "merged"), tmp_path / "smaller", 1)
    assert 0.1 < left < 1


def test_a_run_is_a_lora_of_the_model_that_it_started_from(tmp_path: Path) -> None:
    """Its folder may be named where a file of adapters may: added, it draws what the run's model draws."""
    plain: dict[str, Any] = with_system(
        {
            "start": "toy/omnigen2",
            "system": {"decoder": {"lora": {"rank": 2, "alpha": 3, "targets": ["to_q"]}}},
            "stages": {"tune": {"train": ["lora"], "steps": 2, "batch_size": 2, "optimizer": {"lr": 0.5}, "data": {}}},
            "run": {"device": "cpu", "tensorboard": False},
        }
    )
    pairs = {"kind": "toyworld", "task": "text_to_image", "count": 4}
    plain["stages"]["tune"]["data"] = {"size": 32, "sources": {"pairs": pairs}}
    train_recipe(parse(plain), plain, tmp_path / "run")
    run = diptych.load(str(tmp_path / "run"), device="cpu")
    base = draw(diptych.load("toy/omnigen2", device="cpu"))
    wanted = draw(run)
    assert (wanted - base).abs().max() > 0.05
    for name in (tmp_path / "run", tmp_path / "run" / "model"):
        torch.testing.assert_close(draw(diptych.load("toy/omnigen2", lora=str(name), device="cpu")), wanted)
    with pytest.raises(UserError, match="toy/iomm: was trained without LoRA"):
        diptych.load("toy/omnigen2", lora="toy/iomm", device="cpu")
    with pytest.raises(UserError, match="run: this model has no layer"):
        diptych.load("toy/iomm", lora=str(tmp_path / "run"), device="cpu")


def test_trained_and_added_updates_are_merged_together(folder: Path) -> None:
    engine = tuned("toy/omnigen2", "decoder")
    lora.add(engine.system, [f"{folder}/toy-omnigen2:0.5"])
    wanted = draw(engine)
    assert lora.merge(engine.system) == 16
    torch.testing.assert_close(draw(engine), wanted, atol=1e-4, rtol=0)
    assert not any("lora" in key or "base" in key.split(".") for key in engine.system.state_dict())


@pytest.mark.parametrize("name", ["toy/omnigen2"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_lora_goes_with_quantisation_and_offload(name: str, quantize: Any, folder: Path) -> None:
    if quantize != "none":
        pytest.importorskip("bitsandbytes")
    given: Any = {"device": "cpu", "quantize": quantize, "offload": "layers"}
    plain = draw(diptych.load(name, **given))
    added = draw(diptych.load(name, lora=f"{folder}/toy-omnigen2", **given))
    wanted = draw(diptych.load(name, device="cpu", lora=f"{folder}/toy-omnigen2"))
    assert (added - plain).abs().mean() > 0.02
    assert (added - wanted).abs().mean() < 0.1
    if quantize == "none":
        assert torch.equal(added, wanted)


def test_merged_into_the_published_layout(tmp_path: Path) -> None:
    """transformers reads the result, and it is the sum."""
    mllm, _ = load_system("toy/mllm")
    [module] = lora.homes(mllm).values()
    add_lora(module, rank=2, alpha=3.0, dropout=0.0, targets=["q_proj"])
    for key, parameter in module.named_parameters():
        if ".lora_" in key:
            nn.init.normal_(parameter, std=0.1)
    layers = lora.of_model(mllm)
    lora.write(mllm, layers, tmp_path / "peft", "peft")
    assert (
        main(
            [
                "lora",
                "merge",
                "toy/mllm",
                "--lora",
                f"{tmp_path}/peft:2",
                "-o",
                f"{tmp_path}/out",
                "--layout",
                "published",
            ]
        )
        == 0
    )
    theirs = InternVLForConditionalGeneration.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
    before: Any = load_system("toy/mllm")[0]
    weights = theirs.state_dict()
    for layer, factors in layers["llm"].items():
        plain = before.backbone.model.state_dict()[f"{layer}.weight"]
        torch.testing.assert_close(weights[f"{layer}.weight"], plain + 2 * factors.delta())


def test_the_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, source = "toy/omnigen2", f"{folder}/toy-omnigen2"
    for format in ("peft", "comfyui", "kohya"):
        out = str(tmp_path / format)
        assert main(["lora", "export", name, "--lora", source, "--to", format, "-o", out]) == 0
        assert main(["lora", "import", name, out, "-o", f"{out}-back"]) == 0
        ours, theirs = (load_file(Path(place) / "adapter_model.safetensors") for place in (source, f"{out}-back"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert main(["lora", "merge", name, "--lora", f"{source}:0.5", "-o", str(tmp_path / "merged")]) == 0
    assert main(["lora", "extract", name, str(tmp_path / "merged"), "--rank", "3", "-o", str(tmp_path / "ex")]) == 0
    assert "16 layers merged" in capsys.readouterr().out
    picture = tmp_path / "a.png"
    given = ["--steps", "1", "--prompt-expansion", "0", "--device", "cpu", "-o", str(picture)]
    assert main(["generate", name, "a red circle", "--lora", f"{source}:0.5", *given]) == 0
    with Image.open(picture) as image:
        assert image.info["model"] == f"{name} + {source}:0.5", "the picture carries all that makes it"
    assert main(["ask", "toy/bagel", str(picture), "what?", "--lora", f"{folder}/toy-bagel", "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exprot", "toy/iomm", "-o", "x"], "unknown action 'exprot'. Did you mean 'export'?"),
        (["export", "toy/iomm", "-o", "x"], "toy/iomm: was trained without LoRA; name a file with --lora"),
        (["export", "toy/iomm", "-o", "x", "--to", "diffuser"], "--to: unknown format 'diffuser'. Did you mean"),
        (
            ["export", "toy/omnigen2", "--lora", "{0}/toy-omnigen2", "--to", "diffusers", "-o", "{1}/x"],
            "diffusers has no",
        ),
        (["import", "toy/iomm", "{0}/toy-omnigen2", "-o", "x"], "this model has no layer"),
        (["import", "toy/iomm", "-o", "x"], "diptych lora import takes 2 NAME, not 1"),
        (["merge", "toy/iomm", "-o", "{1}/x"], "there is no LoRA to merge"),
        (
            ["merge", "toy/iomm", "--lora", "{0}/toy-omnigen2:much", "-o", "{1}/x"],
            "the scale after the colon is a number",
        ),
        (["extract", "toy/iomm", "toy/iomm", "-o", "{1}/x"], "its linear layers are those of toy/iomm"),
        (["extract", "toy/iomm", "toy/omnigen2", "-o", "{1}/x"], "the two models have other layers"),
        (["extract", "toy/iomm", "toy/iomm-pretrained", "--rank", "0", "-o", "{1}/x"], "--rank must be at least 1"),
        (["export", "toy/omnigen2", "--lora", "{1}", "-o", "{1}/x"], "no LoRA here"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lora", *(word.format(folder, tmp_path) for word in arguments)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_lora_of_other_sizes_is_refused(tmp_path: Path) -> None:
    tensors = {
        "layers.0.attn.to_q.lora_A.weight": torch.zeros(2, 8),
        "layers.0.attn.to_q.lora_B.weight": torch.zeros(8, 2),
    }
    save_file(tensors, tmp_path / "file.safetensors")
    with pytest.raises(UserError, match="is for a layer of 8 to 8 numbers, this model's has 160 to 160"):
        diptych.load("toy/omnigen2", device="cpu", lora=str(tmp_path / "file.safetensors"))


def test_a_quantised_layer_is_not_merged(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = diptych.load("toy/omnigen2", device="cpu", quantize="nf4", lora=f"{folder}/toy-omnigen2")
    with pytest.raises(UserError, match="is quantised and cannot take the update"):
        lora.merge(model.system)


def test_formats_and_homes() -> None:
    assert set(FORMATS) == {"peft", "diffusers", "comfyui", "kohya"}
    system, _ = load_system("toy/iomm")
    assert isinstance(system, AssembledSystem)
    assert list(lora.homes(system)) == ["decoder", "llm"]


def test_a_format_without_names_for_a_decoder_says_which_have_some() -> None:
    assert lora.unnamed(Sana.from_config(tiny_sizes.SANA)) == {
        "comfyui": "names the layers of a Sana otherwise than its release does"
    }
    ovis: Any = load_system("toy/ovis-u1")[0]
    assert lora.unnamed(ovis.decoder).keys() == {"diffusers", "comfyui"}
    layers: Any = {"decoder": {}}
    with pytest.raises(UserError, match="diffusers has no decoder of kind OvisU1Decoder; write one of peft, kohya"):
        lora.write(ovis, layers, Path("never"), "diffusers")
