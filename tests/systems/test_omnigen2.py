"""OmniGen2 from its published folder: conditions, guidance, losses over mixed sizes, and the folder written back."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen2VLImageProcessorPil

from diptych.checkpoints.tensors import read_tensors, weight_files
from diptych.core.condition import TokenCondition
from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.sample import Batch, Message, Sample
from diptych.inference.engine import Engine
from diptych.inference.sampling import Sampling
from diptych.objectives.flow_matching import FlowMatching
from diptych.parts.autoencoders.kl import KLAutoencoder
from diptych.parts.autoencoders.pixel import PixelAutoencoder
from diptych.parts.backbones.qwen2_5_vl import Qwen2_5VL
from diptych.parts.backbones.toy_tokenizer import train_tokenizer
from diptych.parts.conditioners.linear import IdentityConnector, LinearConfig
from diptych.parts.conditioners.raw import Raw, RawConfig
from diptych.parts.decoders.mmdit import MMDiT, MMDiTConfig
from diptych.parts.decoders.omnigen2 import LORA_TARGETS, OmniGen2, OmniGen2Config
from diptych.parts.lora import add_lora
from diptych.recipes.families.omnigen2 import OmniGen2Release
from diptych.recipes.load import load_system
from diptych.recipes.pack import save
from diptych.systems.composed import ComposedSystem
from diptych.systems.grids import shrunk
from diptych.systems.presets import OmniGen2Settings
from diptych.training.loop import freeze

ROWS = 330
TEXTS = ["a red circle left of a blue square", "put the hat of image 2 on the dog in image 1", "how many?", "two"] * 4
BACKBONE: dict[str, Any] = {
    "video_token_id": ROWS - 1,
    "tie_word_embeddings": True,
    "text_config": {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "vocab_size": ROWS,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 24,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [0],
    },
}
SIZES = OmniGen2Config(
    in_channels=4,
    hidden_size=24,
    num_layers=1,
    num_refiner_layers=1,
    num_attention_heads=2,
    num_kv_heads=1,
    multiple_of=8,
    axes_dim_rope=(4, 4, 4),
    axes_lens=(128, 128, 128),
    text_feat_dim=24,
)
VAE: dict[str, Any] = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
    "shift_factor": 0.1,
}


def made(**options: Any) -> ComposedSystem:
    """A system with random weights in every part."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([*TEXTS, OmniGen2Settings().system], 320)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]})
    config = {**BACKBONE, "image_token_id": tokenizer.get_vocab()["<|image_pad|>"]}
    processor = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=256)
    backbone = Qwen2_5VL.from_config(config, tokenizer, processor)
    decoder, autoencoder = OmniGen2(SIZES), KLAutoencoder.from_config(VAE)
    for parameter in (*backbone.parameters(), *decoder.parameters()):
        nn.init.normal_(parameter, std=0.2)
    kinds = {"backbone": "qwen2_5_vl", "decoder": "omnigen2", "autoencoder": "kl"}
    system = ComposedSystem(
        OmniGen2Settings(**options),
        kind="omnigen2",
        backbone=backbone,
        conditioner=Raw(RawConfig()),
        connector=IdentityConnector(LinearConfig(width=24, out=24)),
        decoder=decoder,
        autoencoder=autoencoder,
        origins={name: {"kind": kind, "weights": None} for name, kind in kinds.items()},
    )
    return system.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release in the published layout."""
    folder = tmp_path_factory.mktemp("release") / "OmniGen2"
    OmniGen2Release().to_release(made(), folder, shard_bytes=20_000)
    return folder


@pytest.fixture(scope="module")
def loaded(release: Path) -> ComposedSystem:
    system = load_system(str(release))[0]
    assert isinstance(system, ComposedSystem)
    return system.requires_grad_(False).eval()


@pytest.fixture
def system(loaded: ComposedSystem) -> ComposedSystem:
    """A copy to change at will."""
    return copy.deepcopy(loaded)


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


PAIR = Sample(id="pair", task="text_to_image", image=picture(16, 24), text=TEXTS[0])
EDIT = Sample(
    id="edit",
    task="edit",
    image=picture(8, 16, 1),
    text=TEXTS[1],
    context_images=(picture(16, 16, 2), picture(8, 20, 3)),
)
TOLD = Sample(
    id="told",
    task="understand",
    context_images=(picture(8, 8, 4), picture(8, 16, 5)),
    messages=(
        Message(role="user", text="<image><image> how many?"),
        Message(role="assistant", text="two"),
        Message(role="user", text="how many?"),
        Message(role="assistant", text="a red circle"),
    ),
)


def with_settings(system: ComposedSystem, **options: Any) -> ComposedSystem:
    system.settings = replace(system.settings, **options)
    return system


def row(condition: TokenCondition, index: int) -> Tensor:
    return condition.tokens[index][condition.full_mask()[index]]


# Conditions


def test_text_states_are_the_post_norm_states_of_the_chat(loaded: ComposedSystem) -> None:
    """The released pipeline's: system and user turn through the chat template, no turn opened, every state kept."""
    backbone = loaded.backbone
    assert isinstance(backbone, Qwen2_5VL)
    system, user = loaded.settings.system, TEXTS[1]
    text = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
    ids = torch.tensor([backbone.tokenizer(text, add_special_tokens=False)["input_ids"]])
    states = backbone.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    expected = loaded.decoder.refine(TokenCondition(tokens=states)).tokens[0]
    condition = loaded.encode(Batch((PAIR, EDIT)))
    torch.testing.assert_close(row(condition, 1), expected, atol=1e-5, rtol=1e-5)


def test_the_prompt_is_worded_for_its_mllm(system: ComposedSystem) -> None:
    plain = system.encode(Batch((replace(PAIR, text=f"draw: {TEXTS[0]}."),)))
    with_settings(system, prompt="draw: {text}.")
    assert isinstance(plain, TokenCondition)
    worded = system.encode(Batch((PAIR,)))
    assert isinstance(worded, TokenCondition)
    torch.testing.assert_close(worded.tokens, plain.tokens)
    dropped = system.encode(system.without(Batch((PAIR,)), "text"))
    assert isinstance(dropped, TokenCondition)
    assert dropped.tokens.shape[1] < worded.tokens.shape[1]


def test_an_opening_begins_the_assistants_turn(system: ComposedSystem) -> None:
    plain = row(system.encode(Batch((PAIR,))), 0)
    opened = row(with_settings(system, assistant_prefix="how many circles").encode(Batch((PAIR,))), 0)
    backbone = system.backbone
    assert isinstance(backbone, Qwen2_5VL)
    turn = backbone.tokenizer("<|im_start|>assistant\nhow many circles", add_special_tokens=False)["input_ids"]
    assert len(opened) == len(plain) + len(turn)


def test_edits_may_have_words_of_their_own(system: ComposedSystem) -> None:
    plain = system.encode(Batch((PAIR, replace(EDIT, text=f"two. {TEXTS[1]}"))))
    worded = with_settings(system, edit_prompt="two. {text}").encode(Batch((PAIR, EDIT)))
    torch.testing.assert_close(worded.tokens, plain.tokens)


def test_a_thought_is_drawn_in_the_captions_place(system: ComposedSystem) -> None:
    batch = Batch((PAIR,))
    with pytest.raises(UserError, match="cannot expand prompts"):
        Engine(system, Sampling(size=(16, 16), steps=1)).generate("two", prompt_expansion=3)
    thought, (said,) = with_settings(system, expansion="how many? {text}").expand(batch, 3)
    asked = [Message(role="user", text=f"how many? {PAIR.text}")]
    assert said == system.generate_text([asked], [[]], max_new_tokens=3)[0]
    assert thought.samples == (replace(PAIR, text=said),)


def test_reference_latents_are_the_autoencoders_at_whole_patches(system: ComposedSystem) -> None:
    latents = system.encode(Batch((PAIR, EDIT))).context_latents
    assert latents is not None
    assert [[tuple(x.shape) for x in images] for images in latents] == [[], [(4, 8, 8), (4, 4, 10)]]
    torch.testing.assert_close(latents[1][0], system.to_latents(EDIT.context_images[0][None])[0])
    odd = replace(EDIT, context_images=(picture(19, 30),))
    found = with_settings(system, max_pixels=300).encode(Batch((odd,))).context_latents
    assert found is not None
    assert tuple(found[0][0].shape) == (4, 6, 10)  # 19 x 30 shrunk to 13.8 x 21.8, cut to multiples of 4
    assert system.encode(Batch((PAIR,))).context_latents == ((),)
    assert with_settings(system, reference_latents=False).encode(Batch((EDIT,))).context_latents is None


def test_what_the_mllm_sees(system: ComposedSystem) -> None:
    """Image states may be left out after they were read: as many tokens as text alone, but other ones."""
    text = row(system.encode(Batch((EDIT,))), 0)
    kept = row(with_settings(system, mllm_images="kept").encode(Batch((EDIT,))), 0)
    left = row(with_settings(system, mllm_images="dropped").encode(Batch((EDIT,))), 0)
    slots = sum(len(tokens) for tokens in system.backbone.vision_tokens(EDIT.context_images))
    marks = 4  # vision start and end of two images
    assert len(kept) == len(text) + slots + marks
    assert len(left) == len(text) + marks
    other = replace(EDIT, context_images=(picture(16, 16, 8), EDIT.context_images[1]))
    changed = row(system.encode(Batch((other,))), 0)
    assert not torch.allclose(left, changed)


def test_drops(system: ComposedSystem) -> None:
    batch, draws = Batch((PAIR, EDIT)), Draws([1, 2])
    plain = system.encode(batch)
    never = with_settings(system, cfg_dropout=0.0).encode(batch, draws)
    torch.testing.assert_close(never.tokens, plain.tokens)
    texts = with_settings(system, cfg_dropout=1.0, cfg_dropout_images=0.0).encode(batch, draws)
    both = with_settings(system, cfg_dropout=1.0, cfg_dropout_images=1.0).encode(batch, draws)
    assert [len(images) for images in texts.context_latents or ()] == [0, 2]
    assert both.context_latents == ((), ())
    torch.testing.assert_close(row(texts, 0), row(texts, 1))  # nothing of the prompt is left
    system.settings = replace(system.settings, system=system.settings.system_dropped)
    null = system.encode(system.without(batch, "text"))
    torch.testing.assert_close(row(null, 0), row(texts, 0))


def test_without(system: ComposedSystem) -> None:
    batch = Batch((PAIR, EDIT))
    assert [(s.text, len(s.context_images)) for s in system.without(batch, "text")] == [("", 0), ("", 2)]
    assert {(s.task, s.text, s.context_images) for s in system.without(batch, "text_and_images")} == {
        ("text_to_image", "", ())
    }


# Drawing and answering


def test_answers_with_several_images_and_turns(loaded: ComposedSystem) -> None:
    engine = Engine(loaded, Sampling(size=(16, 16), steps=1))
    images = [Image.new("RGB", (16, 8), "red"), Image.new("RGB", (8, 8), "blue")]
    assert isinstance(engine.ask(images, "how many?", max_new_tokens=3), str)
    turns = [
        Message(role="user", text="<image> how many?"),
        Message(role="assistant", text="two"),
        Message(role="user", text="a red circle"),
    ]
    alone = loaded.generate_text([turns], [[picture(8, 8)]], max_new_tokens=3)
    batch = loaded.generate_text([[turns[2]], turns], [[], [picture(8, 8)]], max_new_tokens=3)
    assert batch[1] == alone[0]


def test_edits_with_several_references_in_one_batch(loaded: ComposedSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(
        size=(16, 24), steps=2, cfg=3.0, image_cfg=1.5, guidance="omnigen2", timestep_shift="root", batch_size=4
    )
    engine = Engine(loaded, sampling)
    groups = [
        [Image.new("RGB", (16, 8), color) for color in ("red", "green", "blue", "white", "black")[:count]]
        for count in (1, 2, 5)
    ]
    texts = TEXTS[:3]
    calls: list[list[str]] = []
    encode = loaded.encode

    def counted(batch: Batch, draws: Draws | None = None) -> TokenCondition:
        calls.append([sample.id for sample in batch])
        return encode(batch, draws)

    monkeypatch.setattr(loaded, "encode", counted)
    together = engine.edit(groups, texts, negative="two", size=(16, 24))
    assert [image.size for image in together] == [(24, 16)] * 3
    assert sorted(map(len, calls)) == [1, 3, 3]  # the null condition, the requests, the requests without their text
    last = engine.tensors(
        [Sample(id="edit", task="edit", text=texts[2], context_images=tuple(picture_of(x) for x in groups[2]))],
        n=1, seed=0, negative="two", positions=[2],
    )  # fmt: skip
    apart = np.abs(np.asarray(together[2], dtype=np.int16) - pixels(last[0]))
    assert apart.max() <= 1  # rounding to 8 bits
    turned = Sample(id="edit", task="edit", text=texts[2], context_images=tuple(map(picture_of, groups[2][::-1])))
    (other,) = engine.tensors([turned], n=1, seed=0, negative="two", positions=[2])
    assert (other - last[0]).abs().max() > 1e-4  # the order of references counts


def picture_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32).copy()).permute(2, 0, 1) / 127.5 - 1


def pixels(image: Tensor) -> Any:
    return ((image + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.int16)


def test_velocity_takes_the_projects_time(loaded: ComposedSystem) -> None:
    x, t = torch.randn(2, 4, 8, 12), torch.tensor([0.25, 0.75])
    condition = loaded.encode(Batch((PAIR, EDIT)))
    v = loaded.velocity(x, t, condition)
    torch.testing.assert_close(v, torch.stack(loaded.decoder.denoise(list(x), t, condition)))
    assert loaded.latent_shape(16, 24) == (4, 8, 12)


# Training


def test_losses_of_a_mixture(system: ComposedSystem) -> None:
    """Sizes and numbers of references differ; each sample's term is its own, but for its weight."""
    with_settings(system, cfg_dropout=0.0, flow=FlowMatching(timestep_shift="flux"))
    batch, draws = Batch((TOLD, EDIT, PAIR, replace(EDIT, context_images=EDIT.context_images[:1]))), Draws([1, 2, 3, 4])
    terms = system.losses(system.prepare(batch, draws), draws)
    assert {name: len(values) for name, values in terms.items()} == {
        "flow.text_to_image": 1, "flow.edit": 2, "cross_entropy.understand": 1,
    }  # fmt: skip
    for place, (name, index) in enumerate(
        [("cross_entropy.understand", 0), ("flow.edit", 0), ("flow.text_to_image", 0), ("flow.edit", 1)]
    ):
        alone = system.losses(system.prepare(batch.take([place]), draws.take([place])), draws.take([place]))
        assert alone[name].item() == pytest.approx(terms[name][index].item(), rel=1e-4)
    with_settings(system, flow=FlowMatching(timestep_shift="flux", weighting="element"))
    weights = system.prepare(batch, draws).weights
    assert weights["flow.edit"] == [4 * 4 * 8] * 2
    assert weights["flow.text_to_image"] == [4 * 8 * 12]
    assert weights["cross_entropy.understand"] == [1]


def test_flow_loss_by_hand(system: ComposedSystem) -> None:
    with_settings(system, cfg_dropout=0.0, flow=FlowMatching(timestep_shift="root", logit_mean=0.3))
    draws = Draws([5])
    (loss,) = system.losses(system.prepare(Batch((PAIR,)), draws), draws)["flow.text_to_image"]
    assert PAIR.image is not None
    data = system.to_latents(PAIR.image[None])  # (1, 4, 8, 12): 24 tokens
    noise, s = draws.normal("noise", 4, 8, 12), 24**0.5 / 20
    t = torch.sigmoid(0.3 + draws.normal("time"))
    t = s * t / (1 + (s - 1) * t)
    v = system.velocity((1 - t) * data + t * noise, t, system.encode(Batch((PAIR,))))
    assert loss.item() == pytest.approx((v - (noise - data)).square().mean().item(), rel=1e-5)
    cached = replace(PAIR, image=None, latent=data[0])
    assert system.losses(system.prepare(Batch((cached,)), draws), draws)["flow.text_to_image"].item() == pytest.approx(
        loss.item(), rel=1e-5
    )


@pytest.mark.parametrize("parts", [["decoder"], ["llm"], ["vision", "projector"]])
def test_any_part_learns_alone(parts: list[str], system: ComposedSystem) -> None:
    with_settings(system, cfg_dropout=0.0, mllm_images="kept")
    freeze(system, parts)
    torch.cat(
        list(system.losses(system.prepare(Batch((PAIR, EDIT)), Draws([1, 2])), Draws([1, 2])).values())
    ).sum().backward()
    owned = {id(p) for name in parts for p in system.named_parts()[name].parameters()}
    for name, parameter in system.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in owned), name


def test_adapters_are_a_part(system: ComposedSystem) -> None:
    add_lora(system.decoder, rank=2, alpha=2, dropout=0.0, targets=LORA_TARGETS)
    parts = system.named_parts()
    assert set(parts) == {"llm", "vision", "projector", "decoder", "lora", "autoencoder"}
    ids = [id(p) for part in parts.values() for p in set(part.parameters())]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in system.parameters()}
    freeze(system, ["lora"])
    system.losses(system.prepare(Batch((PAIR,)), Draws([1])), Draws([1]))["flow.text_to_image"].sum().backward()
    learned = [name for name, p in system.named_parameters() if p.grad is not None]
    assert learned
    assert all(".lora_" in name for name in learned)


# The published folder


def tensors(folder: Path, part: str) -> dict[str, Tensor]:
    stem = "model" if part == "mllm" else "diffusion_pytorch_model"
    return dict(read_tensors(weight_files(folder / part, stem)))


def test_layout(release: Path) -> None:
    assert {path.name for path in release.iterdir()} == {
        "model_index.json",
        "mllm",
        "processor",
        "scheduler",
        "transformer",
        "vae",
    }
    assert json.loads((release / "model_index.json").read_text())["_class_name"] == "OmniGen2Pipeline"
    config = json.loads((release / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "OmniGen2Transformer2DModel"
    assert config["axes_dim_rope"] == [4, 4, 4]
    assert len(weight_files(release / "transformer", "diffusion_pytorch_model")) > 1  # shards
    assert set(tensors(release, "transformer")) == set(OmniGen2(SIZES).state_dict())
    assert not (release / "mllm" / "tokenizer.json").exists()
    assert (release / "processor" / "tokenizer.json").is_file()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_comes_back_to_the_bit(dtype: torch.dtype, release: Path, tmp_path: Path) -> None:
    """A release in either precision, loaded and written again in its own: the same bits, the same small files."""
    source, back = release, tmp_path / "back"
    if dtype is torch.bfloat16:
        source = tmp_path / "half"
        OmniGen2Release().to_release(made(), source, dtype=dtype)
    (source / "transformer" / "config.json").write_text((source / "transformer" / "config.json").read_text() + "\n")
    system, sampling = load_system(str(source))
    assert (sampling.guidance, sampling.timestep_shift, sampling.cfg, sampling.image_cfg) == (
        "omnigen2",
        "root",
        4.0,
        2.0,
    )
    OmniGen2Release().to_release(system, back, dtype=dtype)
    for part in ("transformer", "mllm", "vae"):
        one, two = tensors(source, part), tensors(back, part)
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            assert tensor.dtype == two[name].dtype, name
            assert torch.equal(tensor, two[name]), name
    for path in source.rglob("*.json"):
        if not path.name.endswith(".index.json"):
            assert path.read_bytes() == (back / path.relative_to(source)).read_bytes(), path


def test_saved_as_published_each_part_keeps_its_number_format(release: Path, tmp_path: Path) -> None:
    """The MLLM in half precision, the transformer in bfloat16, the autoencoder as it is: the same bits again."""
    source = tmp_path / "source"
    shutil.copytree(release, source)
    for part, dtype in (("transformer", torch.bfloat16), ("mllm", torch.float16)):
        for file in (source / part).glob("*.safetensors"):
            save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    save(str(source), tmp_path / "back", layout="published")
    for part in ("transformer", "mllm", "vae"):
        one, two = tensors(source, part), tensors(tmp_path / "back", part)
        assert one.keys() == two.keys()
        assert all(one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one), part


def test_saved_again_it_refers_to_the_release(release: Path, system: ComposedSystem, tmp_path: Path) -> None:
    system.mark_trained(["decoder"])
    with torch.no_grad():
        system.decoder.x_embedder.weight.add_(1)
    system.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names
    assert all(name.startswith("decoder.") for name in names)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["backbone"]["weights"], config["decoder"]["weights"]) == (str(release), None)
    back, _ = load_system(str(tmp_path))
    one, two = system.state_dict(), back.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


# Mistakes


def test_a_release_that_does_not_fit(release: Path, tmp_path: Path) -> None:
    def copied(name: str) -> Path:
        folder = tmp_path / name
        for path in release.rglob("*"):
            if path.is_file():
                target = folder / path.relative_to(release)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        return folder

    other = copied("other")
    (other / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="unknown pipeline 'FluxPipeline'"):
        load_system(str(other))
    mixed = copied("mixed")
    first = weight_files(mixed / "transformer", "diffusion_pytorch_model")[0]
    save_file({f"double_blocks.{name}": x for name, x in load_file(first).items()}, first)
    with pytest.raises(UserError, match=r"transformer: weights do not fit: .* missing .* unexpected"):
        load_system(str(mixed))
    gone = copied("gone")
    (gone / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"release without vae/config.json"):
        load_system(str(gone))
    key = copied("key")
    config = json.loads((key / "transformer" / "config.json").read_text())
    (key / "transformer" / "config.json").write_text(json.dumps({**config, "num_layer": 2}))
    with pytest.raises(UserError, match="Did you mean 'num_layers'"):
        load_system(str(key))


SIX = tuple(picture(8, 8, seed) for seed in range(6))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (replace(EDIT, context_images=SIX), "edit: 6 reference images, the decoder takes at most 5"),
        (replace(EDIT, context_images=()), "edit: task 'edit' needs an image to edit"),
        (replace(PAIR, image=None), "pair: task 'text_to_image' needs a target image"),
        (replace(PAIR, task="image"), "pair: task 'image' is none of this system's"),
        (replace(PAIR, text="two " * 60), "pair: .* text tokens and images of 4x6 tokens need .* positions"),
        (replace(PAIR, text="two " * 300), "the model takes 256"),
        (replace(PAIR, image=picture(16, 152)), "pair: .* need 38 positions on the column axis"),
    ],
)
def test_samples_that_cannot_be_learned(sample: Sample, message: str, system: ComposedSystem) -> None:
    with_settings(system, cfg_dropout=0.0)
    system.decoder.config = replace(SIZES, axes_lens=(60, 100, 36))
    with pytest.raises(UserError, match=message):
        system.losses(system.prepare(Batch((sample,)), Draws([1])), Draws([1]))


TINY = MMDiTConfig(channels=4, patch=2, hidden=16, heads=2, double=1, single=1, axes=(2, 2, 4), condition_width=24)


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    fit = made()
    parts: dict[str, Any] = {"backbone": fit.backbone, "decoder": fit.decoder, "autoencoder": fit.autoencoder}
    parts |= {"conditioner": fit.conditioner, "connector": fit.connector, "kind": "omnigen2"}
    for change, message in (
        ({"autoencoder": PixelAutoencoder()}, "takes 4 latent channels, the autoencoder gives 3"),
        ({"settings": OmniGen2Settings(), "decoder": MMDiT(TINY)}, "the decoder MMDiT reads no context images"),
    ):
        with pytest.raises(UserError, match=message):
            ComposedSystem(**{"settings": OmniGen2Settings(), "origins": {}, **parts, **change})
    add_lora(fit.decoder, rank=1, alpha=1, dropout=0.0, targets=["to_q"])
    with pytest.raises(UserError, match="holds no adapters"):
        OmniGen2Release().to_release(fit, tmp_path / "never")
    assert not (tmp_path / "never").exists()


@settings(max_examples=10, deadline=None)
@given(height=st.integers(4, 60), width=st.integers(4, 60), most=st.integers(64, 2000))
def test_references_fit_their_area(height: int, width: int, most: int) -> None:
    fitted = shrunk(torch.zeros(3, height, width), 4, most)
    assert fitted.shape[1] % 4 == fitted.shape[2] % 4 == 0
    assert fitted.shape[1] <= height
    assert fitted.shape[2] <= width
    assert fitted.shape[1] * fitted.shape[2] <= max(most, 4 * max(height, width))


def test_training_as_the_released_sgt_does(system: ComposedSystem) -> None:
    """Picture states kept and the last of them alone, no reference latents, an opened and empty assistant's turn."""
    edit = replace(EDIT, image=picture(16, 16), context_images=EDIT.context_images[:1])
    longer = with_settings(
        system, mllm_images="kept", reference_latents=False, edit_prompt="<img1>: <image>{text}", assistant_turn="open"
    )
    whole = longer.encode(Batch((edit,)))
    assert isinstance(whole, TokenCondition)
    cut = with_settings(longer, max_states=5)
    last = cut.encode(Batch((edit,)))
    assert isinstance(last, TokenCondition)
    assert last.tokens.shape[1] == 5 < whole.tokens.shape[1]
    preparer = cut.preparer()
    batch = preparer.collate([preparer.prepare(edit, Draws([3]))])
    losses = cut.losses(batch, Draws([3]))
    assert losses["flow.edit"].isfinite().all()


@torch.no_grad()
def test_images_of_unlike_sizes_have_the_losses_that_each_has_alone(system: ComposedSystem) -> None:
    """Sizes alternate, so that groups of one size are no neighbours. Mutants: losses in the order of the groups, noise
    by the place in a group."""
    samples = [
        replace(PAIR, id=str(number), image=picture(8, width, number), text=TEXTS[number])
        for number, width in enumerate((8, 16, 8))
    ]
    draws = Draws([11, 12, 13])
    together = system.losses(system.prepare(Batch(tuple(samples)), draws), draws)["flow.text_to_image"]
    for number, sample in enumerate(samples):
        draw = draws.take([number])
        alone = system.losses(system.prepare(Batch((sample,)), draw), draw)["flow.text_to_image"]
        torch.testing.assert_close(together[number], alone[0], rtol=1e-4, atol=1e-5)
