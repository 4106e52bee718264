"""BAGEL's folders: the release's layout there and back to the bit, saved models, plain models as a start, sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from diptych.checkpoints.bagel import our_name, published_name, to_published
from diptych.checkpoints.flux_autoencoder import diffusers_config
from diptych.checkpoints.flux_autoencoder import to_published as flux_published
from diptych.checkpoints.streaming import stream
from diptych.checkpoints.tensors import own_tensors
from diptych.core.errors import UserError
from diptych.parts.autoencoders.kl import KLAutoencoder
from diptych.recipes import bagel, pack
from diptych.recipes.build import build_system
from diptych.recipes.check import check_system
from diptych.recipes.families import bagel as family
from diptych.recipes.load import load_system
from diptych.recipes.recipe import load
from diptych.recipes.tokenizers import read_tokenizer
from diptych.systems.bagel.network import BagelNetwork
from diptych.systems.bagel.system import BagelSystem

sys.path.insert(0, str(Path(__file__).parents[1] / "systems" / "bagel"))
from bagel_system import NETWORK, build, tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "bagel"
SIZES = {"channels": 32, "multipliers": [1, 1], "blocks": 1, "latent_channels": 4}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of tiny sizes in bfloat16, with the published files."""
    from diptych.core.schema import read
    from diptych.systems.bagel.network import NetworkConfig

    folder = tmp_path_factory.mktemp("bagel") / "release"
    folder.mkdir()
    torch.manual_seed(3)
    config = read(NetworkConfig, {**NETWORK, "latent_channels": 4, "latent_patch": 2, "latent_side": 8}, "")
    network = BagelNetwork(config).to(torch.bfloat16)
    save_file(
        {k: v.detach().clone() for k, v in to_published(own_tensors(network).items())}, folder / "ema.safetensors"
    )
    autoencoder = KLAutoencoder.from_config(diffusers_config(**SIZES))  # type: ignore[arg-type]
    latents = {k: v.clone() for k, v in flux_published(autoencoder.model.state_dict().items(), 2)}
    save_file(latents, folder / "ae.safetensors")
    llm, vision = family.plain_configs(config)
    (folder / "llm_config.json").write_text(json.dumps({**llm, "attention_dropout": 0.0}))
    (folder / "vit_config.json").write_text(json.dumps({**vision, "model_type": "siglip_vision_model"}))
    own = tokenizer()
    own.save_pretrained(str(folder))
    return folder


def test_a_release_is_loaded_and_exported_to_the_bit(release: Path, tmp_path: Path) -> None:
    system, sampling = load_system(str(release))
    assert isinstance(system, BagelSystem)
    assert sampling == family.SAMPLING
    assert system.network.dtype == torch.bfloat16
    assert system.network.config.vision.num_hidden_layers == NETWORK["vision"]["num_hidden_layers"]
    family.Bagel().to_release(system, tmp_path / "out")
    for name in ("ema.safetensors", "ae.safetensors"):
        before, after = load_file(release / name), load_file(tmp_path / "out" / name)
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert value.dtype == after[key].dtype
            assert torch.equal(value.view(torch.uint8), after[key].view(torch.uint8)), key
    for name in bagel.CONFIGS:
        assert (release / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    with pytest.raises(UserError, match="exists already"):
        family.Bagel().to_release(system, tmp_path / "out")


def test_saved_as_published_it_is_the_release(release: Path, tmp_path: Path) -> None:
    pack.save(str(release), tmp_path / "out", layout="published")
    for name in ("ema.safetensors", "ae.safetensors"):
        before, after = load_file(release / name), load_file(tmp_path / "out" / name)
        assert {key: value.dtype for key, value in before.items()} == {key: value.dtype for key, value in after.items()}
        same(before, after)


def test_a_model_that_refers_to_a_release_holds_no_weights_of_it(release: Path, tmp_path: Path) -> None:
    system, _ = load_system(str(release))
    system.save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 1000
    again, _ = load_system(str(tmp_path))
    same(system.state_dict(), again.state_dict())


def test_a_saved_model_comes_back(tmp_path: Path) -> None:
    system = build()
    system.mark_trained(system.named_parts())
    system.save_pretrained(tmp_path)
    again, _ = load_system(str(tmp_path))
    assert isinstance(again, BagelSystem)
    assert again.settings == system.settings
    same(system.state_dict(), again.state_dict())


START = """
start: {release}
stages:
  tune:
    train: [decoder]
    steps: 1
    batch_size: 1
    data: {{size: 32, sources: {{all: {{kind: toyworld, task: text_to_image, count: 4}}}}}}
"""


@pytest.mark.parametrize("config", [None, {"architectures": ["BagelForConditionalGeneration"], "model_type": "bagel"}])
def test_a_recipe_starts_from_a_folder_of_a_release(
    release: Path, tmp_path: Path, config: dict[str, Any] | None
) -> None:
    folder = tmp_path / "release"
    folder.mkdir()
    for path in release.iterdir():
        (folder / path.name).symlink_to(path)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.yaml").write_text(START.format(release=folder))
    recipe, _ = load(str(tmp_path / "mine.yaml"))
    found = check_system(recipe)
    system, _ = load_system(str(release))
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in system.named_parts().items()}
    assert {part.name: part.parameters for part in found.parts} == sizes
    assert {part.weights for part in found.parts} == {str(folder)}


def test_the_sizes_of_a_release_on_the_hub(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its weights: JSON files, and the header of the file of weights."""
    for path in release.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    header = {k: SimpleNamespace(shape=list(v.shape)) for k, v in load_file(release / "ema.safetensors").items()}
    hub = SimpleNamespace(parse_safetensors_file_metadata=lambda *names, revision: SimpleNamespace(tensors=header))
    monkeypatch.setattr(bagel, "HfApi", lambda: hub)
    monkeypatch.setattr(bagel, "locate_configs", lambda name: tmp_path)
    assert bagel.published_sizes("someone/bagel") == bagel.published_sizes(str(release))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def damaged(release: Path, folder: Path, change: Any) -> Path:
    for path in release.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(release / "ema.safetensors")
    change(tensors)
    save_file(tensors, folder / "ema.safetensors")
    return folder


def test_mixed_checkpoints_are_named(release: Path, tmp_path: Path) -> None:
    gone = "language_model.model.layers.1.mlp_moe_gen.up_proj.weight"
    cases = {
        "missing": (lambda x: x.pop(gone), r"1 missing \(llm.layers.1.gen.up_proj.weight\)"),
        "more": (lambda x: x.update({"sam.weight": torch.zeros(1)}), r"1 unexpected \(sam.weight\)"),
        "shape": (lambda x: x.update({gone: torch.zeros(2, 2)}), "has shape \\[2, 2\\]"),
        "other": (lambda x: x.update({"llm2vae.weight": torch.zeros(16, 64)}), "files of two models"),
        "none": (lambda x: x.pop("llm2vae.weight"), "no BAGEL checkpoint"),
    }
    for name, (change, message) in cases.items():
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=message):
            bagel.load_network(damaged(release, tmp_path / name, change))
    cut = tmp_path / "cut"
    cut.mkdir()
    damaged(release, cut, lambda x: None)
    data = (cut / "ema.safetensors").read_bytes()
    (cut / "ema.safetensors").write_bytes(data[:-100])
    with pytest.raises(UserError, match="cut short"):
        bagel.load_network(cut)


def test_streamed_tensors_are_the_files(release: Path) -> None:
    plain = load_file(release / "ema.safetensors")
    same(dict(stream([release / "ema.safetensors"])), plain)
    wide = {name: tensor.float() for name, tensor in plain.items()}
    same(dict(stream([release / "ema.safetensors"], torch.float32)), wide)


def test_both_experts_start_from_a_plain_qwen(tmp_path: Path) -> None:
    values = {k: v for k, v in NETWORK["llm"].items() if k != "init"}
    for tied in (False, True):
        folder = tmp_path / str(tied)
        plain: Any = Qwen2ForCausalLM(Qwen2Config(**values, tie_word_embeddings=tied))
        plain.save_pretrained(folder)
        system = build(init={"llm": str(folder)})
        for number, layer in enumerate(system.network.llm.mot_layers()):
            expected = plain.model.layers[number].self_attn.q_proj.weight
            assert torch.equal(layer.und.q_proj.weight, expected)
            same(layer.und.state_dict(), layer.gen.state_dict())
        assert torch.equal(system.network.llm.lm_head.weight, plain.lm_head.weight)
        assert torch.equal(system.network.llm.norm_gen.weight, plain.model.norm.weight)
    with pytest.raises(UserError, match="init: unknown part 'vit'"):
        build(init={"vit": "x"})


def test_published_sizes_and_names() -> None:
    system = build_system(family.Bagel().sizes(Path(), "ByteDance-Seed/BAGEL-7B-MoT")[0], meta=True)
    assert isinstance(system, BagelSystem)
    network = system.network
    shapes = {name: list(tensor.shape) for name, tensor in own_tensors(network).items()}
    assert all(tensor.is_meta for tensor in own_tensors(network).values())
    published = {published_name(name): shape for name, shape in shapes.items()}
    assert all(our_name(name) in shapes for name in published)
    assert published == json.loads((GOLDEN / "key_shapes.json").read_text())
    layers = sum(p.numel() for p in network.llm.layers.parameters())
    assert layers == pytest.approx(13.05e9, rel=1e-3)
    assert sum(p.numel() for p in network.vision.parameters()) == pytest.approx(402.6e6, rel=1e-3)
    assert sum(p.numel() for p in network.connector.parameters()) == pytest.approx(17e6, rel=1e-2)
    assert sum(tensor.numel() for tensor in own_tensors(network).values()) == 14_607_260_128  # position tables too
    assert set(published) == names_of_a_larger_model()


def names_of_a_larger_model() -> set[str]:
    """The reference's names at toy size, with as many layers as the published model has."""
    with safe_open(GOLDEN / "bagel_train_forward.safetensors", framework="pt") as file:
        toy = [name.removeprefix("weights.") for name in file.keys() if name.startswith("weights.")]  # noqa: SIM118
    found: set[str] = set()
    for name in toy:
        layers = 28 if name.startswith("language_model.") else 26
        found |= {name.replace(".layers.0.", f".layers.{n}.") for n in range(layers)} if ".layers.0." in name else set()
        found |= set() if ".layers." in name else {name}
    return found


def test_a_configuration_of_its_own_type_is_no_reason_to_warn(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer().save_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bagel", "architectures": ["Bagel"]}))
    read = read_tokenizer(tmp_path)
    assert read.get_vocab() == tokenizer().get_vocab()
    assert capfd.readouterr().err == ""
