"""Representation alignment behind any decoder: its value, its passes of the vision tower, gradients, starts, files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.checkpoints.tensors import own_tensors, released_tensors
from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.sample import Batch, Sample
from diptych.parts.autoencoders.pixel import PixelAutoencoder
from diptych.parts.backbones.base import Backbone
from diptych.recipes.build import build_conditioner, build_connector, build_decoder, build_system
from diptych.recipes.load import load, load_system, start
from diptych.recipes.prepared import Needed
from diptych.recipes.recipe import DataSpec, Part, parse
from diptych.recipes.run import check_parts, train_recipe
from diptych.systems import aligning
from diptych.systems.composed import ComposedSystem
from diptych.systems.presets import Alignment, ComposedConfig, TokenRouting
from diptych.systems.prompts import Prompts
from meta_device import Device
from tiny_sizes import DECODER_SIZES


def picture(seed: int) -> Tensor:
    return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


IMAGE = Sample(id="image", task="image", image=picture(1))
PAIR = Sample(id="pair", task="text_to_image", text="a red circle", image=picture(2))
EDIT = Sample(id="edit", task="edit", text="make it red", image=picture(3), context_images=(picture(4),))
MIXED = Batch((PAIR, IMAGE, EDIT))
DRAWS = Draws([5, 6, 7])


@pytest.fixture(scope="module")
def reader() -> Backbone:
    return load_system("toy/mllm")[0].backbone.requires_grad_(False)  # type: ignore[union-attr]


Make = Callable[..., ComposedSystem]


@pytest.fixture(scope="module")
def make(reader: Backbone) -> Make:
    """A system behind the toy MLLM with random weights in every part of its decoder, its options given."""

    def system(drawer: str = "mmdit", layer: int | None = 1, **options: Any) -> ComposedSystem:
        torch.manual_seed(0)
        conditioner, asks = build_conditioner(Part(kind="raw"), reader, False)
        decoder, draws_of = build_decoder(Part(kind=drawer, config=DECODER_SIZES[drawer]), reader.width, False)
        connector, between = build_connector(Part(kind="linear"), reader.width, decoder.condition_width, False)
        for parameter in decoder.parameters():
            nn.init.normal_(parameter, std=0.2)
        return ComposedSystem(
            ComposedConfig(
                **{"cfg_dropout": 0.0, "reference_latents": decoder.reads_context, **options},
                prompts=Prompts(text_to_image="{text}", image="<image>", edit="<image>{text}"),
                alignment=None if layer is None else Alignment(layer=layer, hidden=8),
            ),
            backbone=reader,
            conditioner=conditioner,
            connector=connector,
            decoder=decoder,
            autoencoder=PixelAutoencoder(),
            origins={"conditioner": asks, "connector": between, "decoder": draws_of},
        )

    return system


def losses(system: ComposedSystem, batch: Batch = MIXED, draws: Draws = DRAWS) -> dict[str, Tensor]:
    return system.losses(system.prepare(batch, draws), draws)


class Seen:
    """What a block gives, and which images the vision tower is shown, in each pass."""

    def __init__(self, system: ComposedSystem, block: nn.Module, patch: pytest.MonkeyPatch) -> None:
        self.outputs: list[Any] = []
        self.images: list[int] = []
        block.register_forward_hook(lambda module, inputs, output: self.outputs.append(output))
        plain = system.backbone.vision_features

        def counted(inputs: Any) -> list[Tensor]:
            self.images.append(len(inputs.grids))
            return plain(inputs)

        patch.setattr(system.backbone, "vision_features", counted)


@pytest.mark.parametrize(("drawer", "layer"), [("mmdit", 1), ("mmdit", 2), ("ovis_u1", 1), ("ovis_u1", 2),
                                               ("omnigen2", 1), ("sana", 1), ("sd3", 1)])  # fmt: skip
def test_it_is_minus_the_cosine_of_the_blocks_image_tokens(
    drawer: str, layer: int, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, with the states that a hook on the block sees: where they stand in its output is each decoder's own."""
    system = make(drawer, layer)
    decoder: Any = system.decoder
    blocks = decoder.layers if drawer == "omnigen2" else decoder.shard_units()
    seen = Seen(system, blocks[layer - 1], monkeypatch)
    terms = losses(system, Batch((PAIR,)), Draws([5]))
    assert set(terms) == {"flow.text_to_image", "align.text_to_image"}
    [output] = seen.outputs
    if isinstance(output, tuple):
        output = output[1] if drawer == "sd3" else output[0]
    count = (32 // decoder.patch) ** 2
    states = output[:, -count:]  # the image's tokens come last; there is no context image
    monkeypatch.undo()
    features = system.backbone.vision_tokens([picture(2)])[0]  # (N, D) of a square grid
    side, wanted = round(len(features) ** 0.5), round(count**0.5)
    grid = features.T.unflatten(1, (side, side))[None]
    grid = nn.functional.interpolate(grid, size=(wanted, wanted), mode="bilinear", antialias=True)
    assert system.projector is not None
    cosine = nn.functional.cosine_similarity(system.projector(states), grid.flatten(2).mT, dim=-1)
    torch.testing.assert_close(terms["align.text_to_image"], -cosine.mean(1), atol=1e-5, rtol=1e-5)
    # The flow loss is that of the same system without alignment.
    plain = losses(make(drawer, None), Batch((PAIR,)), Draws([5]))
    torch.testing.assert_close(terms["flow.text_to_image"], plain["flow.text_to_image"], atol=1e-5, rtol=1e-5)


def test_each_image_runs_through_the_tower_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image that the MLLM reads, its own target, is not run again; those of pairs and edits are run beside it."""
    system = make()
    plain = losses(system)
    seen = Seen(system, nn.Identity(), monkeypatch)
    assert {name: values.item() for name, values in losses(system).items()} == {k: v.item() for k, v in plain.items()}
    assert seen.images == [4]  # targets of pair and edit, the edit's context, and the image, which is both
    losses(system, Batch((IMAGE, IMAGE)), Draws([5, 6]))
    assert seen.images[1:] == [2]
    # In a batch each sample has the value that it has alone, whatever the others bring.
    for place, sample in enumerate(MIXED):
        alone = losses(system, Batch((sample,)), DRAWS.take([place]))
        torch.testing.assert_close(alone[f"align.{sample.task}"], plain[f"align.{sample.task}"], atol=1e-5, rtol=1e-5)
    # Nor is any run for a sample whose prompt was dropped but whose tokens were prepared.
    dropping = make(cfg_dropout=1.0)
    dropped = losses(dropping, Batch((IMAGE,)), Draws([5]))
    known = replace(IMAGE, features=tuple(system.backbone.vision_tokens([picture(1)])))
    seen.images.clear()
    assert torch.equal(losses(dropping, Batch((known,)), Draws([5]))["align.image"], dropped["align.image"])
    assert seen.images == []


def test_hidden_image_tokens_are_aligned_all_the_same(make: Make) -> None:
    """The target of alignment is the whole image, whatever the mask hides from the condition."""
    found = []
    for ratio in (0.0, 1.0):
        system = make(mask_ratio=ratio)
        inputs = system.prepare(Batch((IMAGE,)), Draws([5])).inputs
        found.append(aligning.read_images(system.backbone, inputs.requests, inputs.targets)[1][0])
    assert torch.equal(*found)


def test_gradients_reach_the_projector_and_the_blocks_before(make: Make) -> None:
    system = make("mmdit", 1)
    terms = losses(system)
    torch.cat([values for name, values in terms.items() if name.startswith("align.")]).sum().backward()

    def reached(module: nn.Module) -> bool:
        return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())

    first, second = system.decoder.shard_units()
    parts = system.named_parts()
    assert reached(parts["alignment"])
    assert reached(first)
    assert not reached(second)
    assert not reached(system.backbone)
    # Nor does a vision tower that learns learn to be aligned.
    parts["vision"].requires_grad_(True)
    losses(system, Batch((PAIR,)), Draws([5]))["align.text_to_image"].sum().backward()
    assert not reached(parts["vision"])
    parts["vision"].requires_grad_(False)


@pytest.mark.parametrize("drawer", ["mmdit", "ovis_u1", "omnigen2"])
def test_the_host_waits_for_no_device(drawer: str, make: Make) -> None:
    """A step with alignment and routed tokens, on the meta device; tables of positions are copied in the first."""
    system = copy.deepcopy(make(drawer, 1, token_routing=TokenRouting(share=0.5, first=1, last=-1)))
    preparer = system.preparer()
    prepared = preparer.collate([preparer.prepare(s, DRAWS.take([row])) for row, s in enumerate(MIXED)])
    system.to("meta")
    for number in range(2):
        with Device() as device:
            terms = system.losses(prepared.to("meta"), Draws([5, 6, 7], "meta"))
            torch.cat(list(terms.values())).sum().backward()
        assert number == 0 or device.waits == []


def test_images_of_several_sizes(make: Make) -> None:
    """A ragged batch has the values that its samples have alone."""
    system = make("omnigen2", 1)
    wide = replace(PAIR, id="wide", image=torch.cat([picture(7), picture(8)], dim=2))
    together = losses(system, Batch((wide, PAIR)), Draws([1, 2]))["align.text_to_image"]
    alone = [losses(system, Batch((s,)), Draws([k]))["align.text_to_image"] for k, s in ((1, wide), (2, PAIR))]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("drawer", "layer", "message"),
    [
        ("zimage", 1, "alignment: ZImage gives no states of its blocks; use mmdit"),
        ("qwen_image", 1, "alignment: QwenImage gives no states of its blocks; use mmdit"),
        ("mmdit", 3, r"alignment: layer 3 of MMDiT, which has 2 \(1 to 2\)"),
        ("mmdit", 0, r"alignment: layer 0 of MMDiT, which has 2 \(1 to 2\)"),
        ("omnigen2", 2, r"alignment: layer 2 of OmniGen2, which has 1"),
    ],
)
def test_decoders_and_layers_that_cannot_be_aligned(drawer: str, layer: int, message: str, make: Make) -> None:
    with pytest.raises(UserError, match=message):
        make(drawer, layer)


@pytest.mark.parametrize("drawer", ["zimage", "qwen_image", "sana", "sd3"])
def test_decoders_that_route_no_tokens(drawer: str, make: Make) -> None:
    with pytest.raises(UserError, match=r"token_routing: the blocks of \w+ cannot be skipped; use mmdit, ovis_u1 or o"):
        make(drawer, None, token_routing=TokenRouting(share=0.5))


def test_a_latent_alone_cannot_be_aligned(make: Make) -> None:
    cached = replace(PAIR, image=None, latent=PAIR.image)
    with pytest.raises(UserError, match="pair: alignment looks at the target image, but there is its latent alone"):
        losses(make(), Batch((cached,)), Draws([5]))


def test_a_run_trains_saves_and_starts_with_and_without_it(
    tiny_plain: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    aligned = copy.deepcopy(tiny_plain)
    aligned["system"]["alignment"] = {"layer": 1, "hidden": 8}
    aligned["stages"]["mix"] |= {"train": ["queries", "decoder", "alignment"], "loss_weights": {"align": 0.5}}
    aligned["stages"]["mix"]["steps"] = 2
    assert train_recipe(parse(aligned), aligned, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "align.text_to_image" in lines
    assert "align.image" in lines
    saved = load(str(tmp_path / "run")).system
    assert isinstance(saved, ComposedSystem)
    assert saved.projector is not None
    # A start from it without alignment leaves the projector out; one with it takes it; and one from a model without
    # it keeps its own, drawn from the recipe's seed.
    model = str(tmp_path / "run" / "model")
    assert getattr(start(parse({**tiny_plain, "start": model})), "projector", None) is None
    taken = start(parse({**aligned, "start": model}))
    assert isinstance(taken, ComposedSystem)
    assert taken.projector is not None
    for mine, theirs in zip(taken.projector.parameters(), saved.projector.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    own = start(parse({**aligned, "start": str(tiny_model)}))
    untrained = copy.deepcopy({**aligned, "start": str(tiny_model)})
    untrained["stages"]["mix"]["train"] = ["queries", "decoder"]
    with pytest.raises(UserError, match=r"stages\.mix\.train: .*which start \(.*\) does not have and no stage trains"):
        start(parse(untrained))
    start(parse({**untrained, "start": model}))
    drawn = start(parse(aligned))
    assert isinstance(own, ComposedSystem)
    assert isinstance(drawn, ComposedSystem)
    assert own.projector is not None
    assert drawn.projector is not None
    for mine, theirs in zip(own.projector.parameters(), drawn.projector.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not any(name.startswith("projector.") for name in released_tensors(own))
    assert {*own_tensors(own)} - {*released_tensors(own)} == {
        f"projector.{name}" for name in own.projector.state_dict()
    }


def test_a_projector_that_no_stage_trains_is_refused(tiny_plain: dict[str, Any]) -> None:
    tiny_plain["system"]["alignment"] = {"layer": 1, "hidden": 8}
    recipe = parse(tiny_plain)
    with pytest.raises(UserError, match=r"stages\.mix\.train: system\.alignment compares through a projector, and no"):
        check_parts(recipe, build_system(recipe.system))
    tiny_plain["stages"]["mix"]["loss_weights"] = {"align": 0.0}
    check_parts(parse(tiny_plain), build_system(recipe.system))


def test_which_prepared_data_still_need_the_images(make: Make) -> None:
    data = DataSpec(size=32, sources={})
    aligned, plain = Needed(make(), data), Needed(make(layer=None), data)
    known: Any = object()
    for task, sets, wanted in (
        ("text_to_image", {"latents": known}, True),
        ("text_to_image", {"latents": known, "states": known}, True),
        ("image", {"latents": known, "features": known}, False),
        ("image", {"latents": known, "states": known}, True),
        ("edit", {"latents": known, "features": known}, True),
    ):
        assert aligned.pixels(task, sets) is wanted, (task, sets)  # type: ignore[arg-type]
    assert plain.pixels("text_to_image", {"latents": known}) is False
