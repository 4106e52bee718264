from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.core.errors import UserError
from diptych.parts.autoencoders.pixel import PixelAutoencoder
from diptych.recipes.recipe import DataSpec, SourceSpec
from diptych.recipes.sources import build_data, build_source


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
