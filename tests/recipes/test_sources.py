from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.core.errors import UserError
from diptych.data.variations import Variations, Varied
from diptych.parts.autoencoders.pixel import PixelAutoencoder
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
    ],
)
def test_a_key_that_would_be_ignored_is_refused(spec: SourceSpec, key: str) -> None:
    with pytest.raises(UserError, match=f"has no '{key}'"):
        build_source("mine", spec, DataSpec(sources={}, size=32))


def test_unknown_toy_option_names_the_nearest() -> None:
    spec = SourceSpec(kind="toyworld", task="image", options={"strat": 5})
    with pytest.raises(UserError, match="'start'"):
        build_source("toys", spec, DataSpec(sources={}, size=32))


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
