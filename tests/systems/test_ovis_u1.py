"""Ovis-U1 as a system: conditions, guidance, mixed losses, saving, its published layout, and bad input."""

from __future__ import annotations

import copy
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import warm
from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.sample import Batch, Message, Sample
from diptych.data.imaging import from_pil, to_pil
from diptych.inference.engine import Engine
from diptych.inference.sampling import Sampling
from diptych.parts.backbones.ovis import Ovis
from diptych.recipes.build import build_system
from diptych.recipes.families.ovis_u1 import OvisU1
from diptych.recipes.load import load_system
from diptych.recipes.pack import save
from diptych.recipes.recipe import parse
from diptych.recipes.run import save_model, train_recipe
from diptych.systems.composed import ComposedSystem
from diptych.toyworld.samples import ToyWorld
from diptych.training import loop, state
from diptych.training.metrics import read_metrics

LLM: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 320,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
VAE: dict[str, Any] = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.13025,
}


PAIRS: dict[str, Any] = {"kind": "toyworld", "count": 32}


@pytest.fixture(scope="module")
def plain_ovis(tiny_mllm: Path) -> dict[str, Any]:
    stage = {"steps": 2, "batch_size": 4}
    source = {"kind": "toyworld", "count": 32}
    tasks = ("understand", "text_to_image", "edit")
    mixed = {task: {**source, "task": task} for task in tasks}
    return {
        "seed": 1,
        "system": {
            "kind": "ovis_u1",
            "canvas": 8,
            "canvas_pixels": [64, 1024],
            "read_pixels": None,
            "backbone": {
                "kind": "ovis",
                "tokenizer": str(tiny_mllm),
                "config": {
                    "llm": LLM,
                    "vision": VISION,
                    "visual_vocab_size": 20,
                    "max_length": 512,
                    "preface": "",
                    "min_pixels": 1024,
                    "max_pixels": 1024,
                },
            },
            "refiner": {"kind": "token_refiner"},
            "decoder": {
                "kind": "ovis_u1",
                "config": {
                    "channels": 3, "patch": 8, "hidden": 32, "heads": 2, "double": 1, "single": 1, "axes": [4, 6, 6]
                },
            },
            "autoencoder": {"kind": "pixel"},
        },
        "sampling": {"size": [32, 32], "steps": 2, "cfg": 2.0, "edit": {"image_cfg": 1.5}},
        "run": {"log_every": 1, "save_every": 0, "validate_every": 0, "device": "cpu", "tensorboard": False},
        "stages": {
            "adapter": {**stage, "train": ["head", "adapter"], "data": {"size": 32, "sources": mixed}},
            "understanding": {
                "steps": 4,
                "batch_size": 4,
                "train": ["vision", "head", "adapter", "llm"],
                "ema_decay": 0.5,
                "data": {"size": 32, "sources": {"toy": {**source, "task": "understand"}}},
            },
            "editing": {**stage, "train": ["refiner", "decoder"], "data": {"size": 32, "sources": mixed}},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def system(plain_ovis: dict[str, Any]) -> ComposedSystem:
    torch.manual_seed(0)
    made = build_system(parse(plain_ovis).system)
    assert isinstance(made, ComposedSystem)
    for parameter in [*made.decoder.parameters(), *made.refiner.parameters()]:  # both start as the identity
        nn.init.normal_(parameter, std=0.2)
    return made.eval()


def edits(count: int = 2) -> Batch:
    return Batch(tuple(ToyWorld(seed=0).sample("edit", index) for index in range(count)))


@torch.no_grad()
def test_three_branches_as_one_batch_are_three_passes(system: ComposedSystem) -> None:
    batch = edits()
    full = system.encode(batch)
    silent, null = (system.encode(system.without(batch, what)) for what in ("text", "text_and_images"))
    assert [len(row) for row in full.context_latents or ()] == [1, 1]
    assert [len(row) for row in null.context_latents or ()] == [0, 0]
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([0.3, 0.8])
    alone = torch.cat([system.velocity(x, t, branch) for branch in (null, silent, full)])
    together = system.velocity(x.repeat(3, 1, 1, 1), t.repeat(3), null.join([silent, full]))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_opening_follows_the_request_and_is_never_learned(plain_ovis: dict[str, Any]) -> None:
    plain = copy.deepcopy(plain_ovis)
    batch = Batch((*edits(1), *(ToyWorld(seed=0).sample("understand", index) for index in range(2))))
    torch.manual_seed(0)
    without = build_system(parse(plain).system)
    plain["system"]["prompts"] = {**plain["system"].get("prompts", {}), "assistant_prefix": "how many circles"}
    made = build_system(parse(plain).system)
    assert isinstance(without, ComposedSystem)
    assert isinstance(made, ComposedSystem)
    made.load_state_dict(without.state_dict())
    backbone = made.backbone
    assert isinstance(backbone, Ovis)
    turn = backbone.tokenizer("<|im_start|>assistant\nhow many circles<|im_end|>\n", add_special_tokens=False)
    before, after = (system.encode(batch.take([0])).tokens for system in (without, made))
    assert after.shape[1] == before.shape[1] + len(turn["input_ids"])
    told = [
        system.losses(system.prepare(batch, Draws([0, 1, 2])), Draws([0, 1, 2]))["cross_entropy.understand"]
        for system in (without, made)
    ]
    torch.testing.assert_close(*told)


def test_condition_is_computed_once_and_not_per_step(system: ComposedSystem) -> None:
    calls: dict[str, int] = {"refiner": 0, "llm": 0, "decoder": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    assert isinstance(system.backbone, Ovis)
    parts: dict[str, nn.Module] = {
        "refiner": system.refiner,
        "llm": system.backbone.llm.model,
        "decoder": system.decoder,
    }
    hooks = [part.register_forward_hook(count(name)) for name, part in parts.items()]
    sampling = Sampling(size=(32, 32), steps=2)
    image = Engine(system, sampling).edit(Image.new("RGB", (32, 32)), "make it red", steps=5, cfg=3.0, image_cfg=2.0)
    for hook in hooks:
        hook.remove()
    assert image[0].size == (32, 32)
    assert calls == {"refiner": 3, "llm": 3, "decoder": 5}  # once a branch; guidance in one batch


def test_an_edit_has_the_shape_of_its_image(system: ComposedSystem) -> None:
    """As in the reference, unless a size is asked for; each image is the one that it is by itself."""
    engine = Engine(system, Sampling(size=(32, 32), steps=2, cfg=2.0, edit={"image_cfg": 1.5}))
    pictures = [Image.new("RGB", size, "red") for size in ((30, 18), (24, 40), (31, 17))]
    told: list[tuple[int, int]] = []
    made = engine.edit(pictures, ["bluer"] * 3, n=2, progress=lambda done, of: told.append((done, of)))
    assert [image.size for image in made] == [size for size in ((32, 16), (24, 40), (32, 16)) for _ in range(2)]
    assert told[-1] == (6, 6)
    assert sorted(told) == told
    assert engine.edit(pictures[0], "bluer", size=24)[0].size == (24, 24)
    assert engine.generate("red")[0].size == (32, 32)
    noise = engine.tensors(
        [Sample(id="e", task="edit", text="bluer", context_images=(from_pil(pictures[2]),))], n=2, seed=0, positions=[2]
    )
    for one, again in zip(made[4:], noise, strict=True):
        assert abs(np.asarray(one, dtype=int) - np.asarray(to_pil(again), dtype=int)).max() <= 1


def test_one_batch_of_all_tasks_gives_the_terms_of_each(system: ComposedSystem) -> None:
    world = ToyWorld(seed=0)
    samples = [world.sample(task, i) for i in range(2) for task in ("understand", "text_to_image", "edit")]
    draws = Draws(range(len(samples)))
    terms = system.losses(system.prepare(Batch(tuple(samples)), draws), draws)
    assert {name: len(values) for name, values in terms.items()} == {
        "cross_entropy.understand": 2,
        "flow.text_to_image": 2,
        "flow.edit": 2,
    }
    for row, sample in enumerate(samples):
        alone = system.losses(system.prepare(Batch((sample,)), draws.take([row])), draws.take([row]))
        for name, values in alone.items():
            torch.testing.assert_close(values[0], terms[name][row // 3], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="task 'image'"):
        system.losses(system.prepare(Batch((world.sample("image", 0),)), Draws([0])), Draws([0]))


def test_conversations_with_several_images_and_turns(system: ComposedSystem) -> None:
    talk = [
        Message(role="user", text="<image><image> which?"),
        Message(role="assistant", text="this"),
        Message(role="user", text="and <image>?"),
    ]
    images = [torch.zeros(3, 20, 50), torch.ones(3, 32, 32), torch.zeros(3, 64, 16)]
    assert len(system.generate_text([talk], [images], max_new_tokens=2)) == 1
    with pytest.raises(UserError, match="3 <image> placeholders but 2 images"):
        system.generate_text([talk], [images[:2]])


def test_too_long_is_an_error_or_cut_when_asked_for(plain_ovis: dict[str, Any]) -> None:
    plain = copy.deepcopy(plain_ovis)
    plain["system"]["backbone"]["config"]["max_length"] = 48
    long = Message(role="user", text="<image>" + "how many? " * 20)
    talk = [long, Message(role="assistant", text="three")]
    image = torch.zeros(3, 32, 32)
    told = Sample(id="t", task="understand", messages=tuple(talk), context_images=(image,))
    late = Sample(
        id="u", task="understand", messages=(Message(role="user", text="<image>"), *talk[1:]), context_images=(image,)
    )
    made = build_system(parse(plain).system)
    with pytest.raises(UserError, match="would be cut"):
        made.losses(made.prepare(Batch((told,)), Draws([0])), Draws([0]))
    with pytest.raises(UserError, match="would be cut"):
        made.generate_text([talk[:1]], [[image]], max_new_tokens=2)
    plain["system"]["too_long"] = "cut"
    made = build_system(parse(plain).system)
    assert isinstance(made, ComposedSystem)
    values = made.losses(made.prepare(Batch((told, late)), Draws([0, 1])), Draws([0, 1]))["cross_entropy.understand"]
    assert values[0] == 0  # its answer lies beyond what is kept
    assert values[1] > 0
    values.sum().backward()
    assert len(made.generate_text([talk[:1]], [[image]], max_new_tokens=2)) == 1
    request = Sample(id="r", task="text_to_image", text="red " * 60)
    made.eval()
    assert made.encode(Batch((request,))).tokens.shape[1] == 48


def test_bad_requests_are_one_clear_line(system: ComposedSystem) -> None:
    thin = torch.zeros(3, 1, 5000)
    for sample, words in (
        (Sample(id="e", task="edit", text="more red"), "e: task 'edit' needs an image"),
        (
            Sample(id="e", task="edit", text="<image> on <image>", context_images=(torch.zeros(3, 32, 32),)),
            "e: 2 <image>",
        ),
        (Sample(id="e", task="edit", text="more red", context_images=(thin,)), "1x5000 pixels: too long and thin"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            system.encode(Batch((sample,)))
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_stopped_in_the_middle_of_understanding_and_resumed_is_the_whole_run(
    plain_ovis: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = copy.deepcopy(plain_ovis)
    train_recipe(parse(plain), plain, tmp_path / "whole")
    calls = 0

    def stop(*_: Any) -> bool:
        nonlocal calls
        calls += 1
        return calls == 4  # the second step of the second stage

    @contextmanager
    def signalled() -> Iterator[Callable[..., bool]]:
        yield stop

    with monkeypatch.context() as patched:
        patched.setattr(loop, "stop_signal", signalled)
        assert not train_recipe(parse(plain), plain, tmp_path / "parts")
    last = state.checkpoints(tmp_path / "parts" / "checkpoints")[-1]
    assert (state.read_progress(last).stage, state.read_progress(last).step) == (1, 2)
    assert train_recipe(parse(plain), plain, tmp_path / "parts", resume=True)
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_stage_3_and_resumed_is_the_whole_run(
    plain_ovis: dict[str, Any], tmp_path: Path
) -> None:
    """The six stages in a process of their own, which gets SIGKILL while stage 3 runs."""
    plain = copy.deepcopy(plain_ovis)
    stages = plain["stages"]
    drawn = {**stages["editing"], "data": {"size": 32, "sources": {"pairs": {**PAIRS, "task": "text_to_image"}}}}
    encoder = {**stages["adapter"], "train": ["vision", "head", "adapter"]}
    plain["stages"] = {
        "stage0": drawn,
        "stage1": stages["adapter"],
        "stage2": encoder,
        "stage3": {**stages["understanding"], "steps": 40},
        "stage4": drawn,
        "stage5": stages["editing"],
    }
    plain["run"] |= {"save_every": 2}
    (tmp_path / "six.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    train_recipe(parse(plain), plain, tmp_path / "whole")
    checkpoints = tmp_path / "parts" / "checkpoints"
    limit = time.monotonic() + 900
    words = ("train", str(tmp_path / "six.yaml"), "--out", str(tmp_path / "parts"))
    child = warm.command(*words, output=tmp_path / "said")
    with warm.ended(child):
        while not in_stage(checkpoints, 3):
            assert child.is_alive(), "the run ended before it could be killed"
            assert time.monotonic() < limit, "the run never came to stage 3"
            time.sleep(0.01)
    assert child.exitcode == -signal.SIGKILL
    last = state.read_progress(state.checkpoints(checkpoints)[-1])
    assert last.stage == 3
    assert 2 <= last.step < 40
    plain = yaml.safe_load((tmp_path / "six.yaml").read_text())
    assert train_recipe(parse(plain), plain, tmp_path / "parts", resume=True)
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert read_metrics(tmp_path / "whole" / "metrics.jsonl") == read_metrics(tmp_path / "parts" / "metrics.jsonl")


def in_stage(checkpoints: Path, stage: int) -> list[Path]:
    """Complete checkpoints of a stage; the run may be writing and removing others meanwhile."""
    found: list[Path] = []
    for path in state.checkpoints(checkpoints) if checkpoints.is_dir() else []:
        with suppress(OSError):
            found += [path] if state.read_progress(path).stage == stage else []
    return found


@pytest.fixture
def release(plain_ovis: dict[str, Any], tmp_path: Path) -> Path:
    """A tiny model with a VAE in the published layout, the MLLM and decoder in bfloat16."""
    plain = copy.deepcopy(plain_ovis)
    plain["system"]["autoencoder"] = {"kind": "kl", "config": VAE}
    plain["system"]["decoder"]["config"] |= {"channels": 4, "patch": 2}
    torch.manual_seed(0)
    made = build_system(parse(plain).system).to(torch.bfloat16).float()
    assert isinstance(made, ComposedSystem)
    kinds = ("llm", "visual_tokenizer", "vte", "visual_generator.backbone")
    made.origins["release"] = {"dtypes": dict.fromkeys(kinds, "bfloat16"), "head": True}
    OvisU1().to_release(made, tmp_path / "release")
    return tmp_path / "release"


def test_the_published_layout_comes_back_to_the_bit(release: Path, tmp_path: Path) -> None:
    loaded, sampling = load_system(str(release))
    assert isinstance(loaded, ComposedSystem)
    assert (sampling.steps, sampling.cfg, sampling.edit["image_cfg"]) == (50, 5.0, 1.5)
    OvisU1().to_release(loaded, tmp_path / "again")
    one, two = (load_file(folder / "model.safetensors") for folder in (release, tmp_path / "again"))
    assert one.keys() == two.keys()
    assert all(one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one)
    assert (release / "config.json").read_bytes() == (tmp_path / "again" / "config.json").read_bytes()
    (tmp_path / "ours").mkdir()
    loaded.save_pretrained(tmp_path / "ours")
    back, _ = load_system(str(tmp_path / "ours"))
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), back.state_dict().values(), strict=True))


def test_fields_that_the_visual_tokenizers_class_writes_beside_the_towers(release: Path, tmp_path: Path) -> None:
    """They count where they mean something, are passed over where the tower says otherwise, and come back exactly."""
    file = release / "config.json"
    config = json.loads(file.read_text())
    tokenizer = config["visual_tokenizer_config"]
    tower = tokenizer["backbone_config"]
    del tower["window_size"]
    tokenizer |= {"min_pixels": 3136, "max_pixels": 1003520, "image_processor_new_kwargs": {"max_pixels": 802816}}
    tokenizer |= {"patch_size": tower["patch_size"] + 2, "temporal_patch_size": 1, "window_size": 56}
    tokenizer |= {"fullatt_block_indexes": None, "preserve_original_pe": True, "interpolate_pe_method": "two_dim"}
    tokenizer |= {"later_option": False}  # of a later version of the class, and off
    file.write_text(json.dumps(config, indent=2))
    (release / "preprocessor_config.json").unlink(missing_ok=True)
    loaded, _ = load_system(str(release))
    made = loaded.config()["backbone"]["config"]
    assert (made["min_pixels"], made["max_pixels"]) == (3136, 802816)
    assert (made["vision"]["window_size"], made["vision"]["patch_size"]) == (56, tower["patch_size"])
    OvisU1().to_release(loaded, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config
    for wrong, message in (
        ({"image_processor_new_kwargs": {"max_pixel": 1}}, "image_processor_new_kwargs: unknown field 'max_pixel'"),
        ({"later_option": 3}, "unknown field 'later_option'"),
    ):
        file.write_text(json.dumps({**config, "visual_tokenizer_config": {**tokenizer, **wrong}}))
        with pytest.raises(UserError, match=message):
            load_system(str(release))


def test_saved_as_published_by_either_way_it_is_the_release(release: Path, tmp_path: Path) -> None:
    """Straight, and by way of our own layout: the same names, number formats and bits."""
    save(str(release), tmp_path / "published", layout="published")
    save(str(release), tmp_path / "ours")
    save(str(tmp_path / "ours"), tmp_path / "back", layout="published")
    one = load_file(release / "model.safetensors")
    for name in ("published", "back"):
        two = load_file(tmp_path / name / "model.safetensors")
        assert one.keys() == two.keys()
        assert all(one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]) for key in one)
        assert json.loads((tmp_path / name / "config.json").read_text()) == json.loads(
            (release / "config.json").read_text()
        )
    save(str(release), tmp_path / "half", layout="published", dtype=torch.float16)
    assert {x.dtype for x in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}


def test_bad_releases_are_one_clear_line(release: Path, tmp_path: Path) -> None:
    config = json.loads((release / "config.json").read_text())

    def refused(changed: dict[str, Any], words: str) -> None:
        (release / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=words) as caught:
            load_system(str(release))
        assert "\n" not in str(caught.value)

    refused({**config, "visual_generator_config": None}, "no generator")
    generator = config["visual_generator_config"]
    refused(
        {**config, "visual_generator_config": {**generator, "num_head": 3}}, "unknown field 'num_head'.*'num_heads'"
    )
    refused({**config, "visual_generator_config": {**generator, "txt_type": "linear"}}, "txt_type 'linear'")
    (release / "config.json").write_text(json.dumps(config))
    file = release / "model.safetensors"
    kept = {name: x for name, x in load_file(file).items() if not name.startswith("visual_generator.")}
    save_file(kept, file)
    refused(config, "no generator")


def test_saved_runs_load_again(system: ComposedSystem, plain_ovis: dict[str, Any], tmp_path: Path) -> None:
    save_model(system, parse(plain_ovis), tmp_path / "model")
    back, sampling = load_system(str(tmp_path / "model"))
    assert sampling.edit == {"image_cfg": 1.5}
    one, two = system.state_dict(), back.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
