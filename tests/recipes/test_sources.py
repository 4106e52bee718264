from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.core.errors import UserError
from diptych.data.loader import steps
from diptych.data.loss_masks import LossMasks
from diptych.data.variations import Variations, Varied
from diptych.parts.autoencoders.pixel import PixelAutoencoder
from diptych.recipes.load import load_system
from diptych.recipes.recipe import DataSpec, SourceSpec
from diptych.recipes.sources import build_data, build_source, mixing_weights


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c", "d"):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        (SourceSpec(kind="folder", task="image", path="x", count=3), "count"),
        (SourceSpec(kind="folder", task="image", path="x", seed=3), "seed"),
        (SourceSpec(kind="jsonl", task="text_to_image", path="x", split="train"), "split"),
        (SourceSpec(kind="jsonl", task="image", path="x", columns={"a": "b"}), "columns"),
        (SourceSpec(kind="toyworld", task="image", path="x"), "path"),
        (SourceSpec(kind="parquet", task="text_to_image", path="x", ignore=("a",)), "ignore"),
        (SourceSpec(kind="toyworld", task="image", masks=LossMasks()), "masks"),
    ],
)
def test_a_key_that_would_be_ignored_is_refused(spec: SourceSpec, key: str) -> None:
    with pytest.raises(UserError, match=f"has no '{key}'"):
        build_source("mine", spec, DataSpec(sources={}, size=32))


def test_unknown_toy_option_names_the_nearest() -> None:
    spec = SourceSpec(kind="toyworld", task="image", options={"strat": 5})
    with pytest.raises(UserError, match="'start'"):
        build_source("toys", spec, DataSpec(sources={}, size=32))


def test_conversations_have_no_loss_masks() -> None:
    spec = SourceSpec(kind="jsonl", task="understand", path="x", masks=LossMasks())
    with pytest.raises(UserError, match=r"sources\.mine: masks are of images to make"):
        build_source("mine", spec, DataSpec(sources={}, size=32))


@pytest.mark.parametrize("cached", [False, True])
def test_loss_masks_reach_the_loss(photos: Path, tmp_path: Path, cached: bool) -> None:
    """Through mixture, latents on disk, held-out split, workers' preparation and collation: the weights are the mask's,
    mirrored where the image is. One of the four photographs has no mask."""
    mask = np.zeros((40, 48), np.uint8)
    mask[:, :24] = 255
    for name in ("a", "b", "c"):
        Image.fromarray(mask).save(photos / f"{name}.mask.png")
    masks = LossMasks(missing="full_weight", unmasked_weight=0.25)
    vary = None if cached else Variations(flip=True)
    spec = SourceSpec(kind="folder", task="image", path=str(photos), masks=masks, vary=vary)
    data = DataSpec(sources={"mine": spec}, size=32, cache=str(tmp_path / "latents") if cached else None)
    system, _ = load_system("toy/iomm")
    mixture, _ = build_data(data, 0, 4, autoencoder=PixelAutoencoder())
    found: set[tuple[float, ...]] = set()
    for step in steps(mixture, system.preparer(), 0, 4, workers=0 if cached else 1):
        batch = step.passes[0].batch
        (weights,) = batch.inputs.targets.weights
        for id, each, count in zip(batch.ids, weights.each(), batch.counts["flow.image"], strict=True):
            assert each.shape == (1, 32, 32)
            assert count == pytest.approx(16 if id.endswith("d.png") else 16 * 0.625)
            found.add((float(each[0, 0, 0]), float(each[0, 0, -1])))
    assert found == ({(1, 0.25), (1, 1)} if cached else {(1, 0.25), (0.25, 1), (1, 1)})


def test_latents_are_kept_between_runs(photos: Path, tmp_path: Path) -> None:
    data = DataSpec(
        sources={"photos": SourceSpec(kind="folder", task="image", path=str(photos))},
        size=32,
        cache=str(tmp_path / "latents"),
    )
    mixture, _ = build_data(data, 0, 4, autoencoder=PixelAutoencoder())
    for sample in mixture.batch(0):
        assert sample.image is not None
        assert sample.latent is not None
        assert torch.equal(sample.latent, sample.image)
    assert len(list((tmp_path / "latents").rglob("*.safetensors"))) == 4


def test_a_cache_needs_an_autoencoder(photos: Path) -> None:
    sources = {"photos": SourceSpec(kind="folder", task="image", path=str(photos))}
    with pytest.raises(UserError, match="cache"):
        build_data(DataSpec(sources=sources, size=32, cache="x"), 0, 4)


def test_held_out_items_are_not_trained_on(photos: Path) -> None:
    sources = {"photos": SourceSpec(kind="folder", task="image", path=str(photos))}
    mixture, ((_, held),) = build_data(DataSpec(sources=sources, size=32, held_out=2), 0, 2)
    assert held is not None
    from diptych.data.source import ItemDraws

    kept = {held.load(i, ItemDraws(0), (32, 32)).id for i in range(len(held))}
    seen = {sample.id for step in range(6) for sample in mixture.batch(step)}
    assert len(kept) == 2
    assert len(seen) == 2
    assert not kept & seen


def test_items_vary_from_visit_to_visit_and_held_out_ones_do_not(photos: Path) -> None:
    for path in photos.glob("*.png"):
        path.with_suffix(".txt").write_text("a frog, moss")
    vary = Variations(trigger="sks", caption_dropout=0.5, flip=True)
    source = SourceSpec(kind="folder", task="text_to_image", path=str(photos), vary=vary)
    data = DataSpec(sources={"photos": source}, size=32, held_out=2)
    mixture, ((train, held),) = build_data(data, 0, 4)
    assert {sample.text for step in range(8) for sample in mixture.batch(step)} == {"", "sks, a frog, moss"}
    assert held is not None
    assert isinstance(held, Varied)
    assert held.variations == Variations(trigger="sks")
    assert len(train) == 2
    with pytest.raises(UserError, match="change images, whose latents"):
        build_data(replace(data, cache=str(photos)), 0, 4, autoencoder=PixelAutoencoder())


def test_repeats_count_items(photos: Path) -> None:
    twice = SourceSpec(kind="folder", task="image", path=str(photos), repeats=2)
    once = SourceSpec(kind="toyworld", task="image", count=16, repeats=1)
    data = DataSpec(sources={"a": twice, "b": once}, size=32)
    assert mixing_weights(data, [4, 16]) == [8.0, 16.0]
    with pytest.raises(UserError, match=r"sources\.b: where one source has repeats, all have"):
        mixing_weights(DataSpec(sources={"a": twice, "b": replace(once, repeats=None)}, size=32), [4, 16])
