"""Captioned images as edits of maps of them: edges, depth, a part left out; and filters by aesthetic score."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from diptych.core.errors import UserError
from diptych.data.control import CONTROLS, ControlSource
from diptych.data.filters import Filters, filtered
from diptych.data.folder import FolderSource
from diptych.data.imaging import to_pil
from diptych.data.loss_masks import LossMasks
from diptych.data.parquet import ParquetSource
from diptych.data.proxies.pictures import DepthMaps
from diptych.data.source import ItemDraws
from diptych.data.webdataset import WebDatasetSource
from diptych.recipes.recipe import DataSpec, SourceSpec
from diptych.recipes.sources import build_source

SIZE = (24, 32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "maps").mkdir()
    (tmp_path / "images").mkdir()
    for name in ("one", "two"):
        pixels = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.txt").write_text(f"the {name}")
        np.save(tmp_path / "maps" / f"{name}.npy", np.arange(48.0 * 64).reshape(48, 64))
    return tmp_path


def pairs(folder: Path) -> FolderSource:
    return FolderSource(folder / "images", task="text_to_image", name="pairs")


@pytest.mark.parametrize("control", ["canny", "inpainting", "outpainting"])
def test_maps_are_of_the_image_that_is_wanted(control: str, folder: Path) -> None:
    source = ControlSource(pairs(folder), control, seed=3)
    assert (len(source), source.task) == (2, "edit")
    for index, name in enumerate(("one", "two")):
        sample = source.load(index, ItemDraws(index), SIZE)
        plain = pairs(folder).load(index, ItemDraws(9), SIZE)
        assert sample.image is not None
        assert plain.image is not None
        assert torch.equal(sample.image, plain.image)
        assert sample.text in [text.replace("{text}", f"the {name}") for text in CONTROLS[control].instructions]
        (seen,) = sample.context_images
        again = source.load(index, ItemDraws(7), SIZE).context_images[0]
        assert torch.equal(seen, again)  # a function of seed and id, whatever the visit draws
        if control == "canny":
            grey = cv2.cvtColor(np.asarray(to_pil(plain.image)), cv2.COLOR_RGB2GRAY)
            edges = np.asarray(cv2.Canny(grey, 100, 200))
            assert np.array_equal(np.asarray(to_pil(seen))[..., 0], edges)
            assert edges.any()
        else:
            same = (seen == plain.image).all(0)
            assert 0 < same.float().mean() < 1
    told = {source.load(0, ItemDraws(draw), SIZE).text for draw in range(20)}
    assert len(told) == 3


def test_outpainting_shows_a_rectangle_on_grey(folder: Path) -> None:
    sample = ControlSource(pairs(folder), "outpainting").load(0, ItemDraws(0), SIZE)
    shown = np.asarray(to_pil(sample.context_images[0]))
    rows, columns = np.nonzero((shown != 127).any(-1))
    inside = np.asarray(to_pil(sample.image))[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]  # type: ignore[arg-type]
    assert np.array_equal(shown[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1], inside)


def test_depth_comes_from_a_folder_cut_as_the_image_is(folder: Path) -> None:
    data = DataSpec(sources={}, size=SIZE)
    spec = SourceSpec(
        kind="folder", task="edit", path=str(folder / "images"), control="depth", maps=str(folder / "maps")
    )
    source = build_source("pairs", spec, data)
    sample = source.load(1, ItemDraws(0), SIZE)
    (depth,) = sample.context_images
    assert depth.shape == (3, *SIZE)
    assert (depth.diff(dim=1) > 0).all()  # nearer at the bottom
    assert sample.extra == {"control": "depth"}


def test_mistakes_are_named(folder: Path) -> None:
    with pytest.raises(UserError, match="unknown control 'cany'"):
        ControlSource(pairs(folder), "cany")
    with pytest.raises(UserError, match="needs them"):
        ControlSource(pairs(folder), "depth")
    with pytest.raises(UserError, match="needs them"):
        ControlSource(pairs(folder), "canny", maps=DepthMaps(folder / "maps"))
    with pytest.raises(UserError, match="captioned images"):
        ControlSource(FolderSource(folder / "images"), "canny")
    data, path = DataSpec(sources={}, size=32), str(folder / "images")
    for spec, words in (
        (SourceSpec(kind="folder", task="text_to_image", path=path, control="canny"), "set task to edit"),
        (SourceSpec(kind="jsonl", task="edit", path=path, control="depth", maps=path), "has no 'maps'"),
        (SourceSpec(kind="toyworld", task="edit", control="canny"), "has no 'control'"),
    ):
        with pytest.raises(UserError, match=words):
            build_source("pairs", spec, data)


def test_the_aesthetic_score_is_a_key_beside_the_image_in_tar_files(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "png")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, score in enumerate((5.9, 6.0, 6.4)):
            row = json.dumps({"caption": "x", "AESTHETIC_SCORE": score}).encode()
            for suffix, content in (("png", buffer.getvalue()), ("json", row)):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    source = WebDatasetSource(tmp_path / "0.tar")
    kept = filtered(source, Filters(min_aesthetic=6.0, columns={"aesthetic": "AESTHETIC_SCORE"}))
    assert (len(kept), list(kept.dropped.values())) == (2, ["aesthetic score 5.9 below 6"])
    with pytest.raises(UserError, match="no aesthetic score"):
        filtered(source, Filters(min_aesthetic=6.0))
    with pytest.raises(UserError, match="leave it out"):
        Filters(columns={"aesthetic": "AESTHETIC_SCORE"})
    with pytest.raises(UserError, match="unknown score 'aestetic'"):
        Filters(min_aesthetic=6.0, columns={"aestetic": "x"})


def test_the_aesthetic_score_is_a_column_of_a_parquet_file(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "png")
    image = {"bytes": buffer.getvalue(), "path": None}
    rows = {"image": [image] * 3, "text": ["x"] * 3, "aesthetic": [5.0, 7.0, 6.5]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "p.parquet"))
    source = ParquetSource(tmp_path / "p.parquet", task="text_to_image", cache=tmp_path / "cache")
    assert len(filtered(source, Filters(min_aesthetic=6.0))) == 2


def test_the_loss_mask_of_the_picture_is_kept(folder: Path) -> None:
    """What an edit learns is the picture, whose mask it is."""
    for name in ("one", "two"):
        Image.new("L", (64, 48), 255).save(folder / "images" / f"{name}.mask.png")
    spec = SourceSpec(
        kind="folder", task="edit", path=str(folder / "images"), control="canny", masks=LossMasks(unmasked_weight=0.5)
    )
    sample = build_source("edges", spec, DataSpec(sources={}, size=SIZE)).load(0, ItemDraws(0), SIZE)
    assert sample.loss_mask is not None
    assert torch.equal(sample.loss_mask, torch.ones(1, *SIZE))
