"""Loss masks: which file is whose, what is refused, and that a mask goes where its image goes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diptych.core.errors import UserError
from diptych.data.folder import FolderSource
from diptych.data.imaging import FitMode, fit
from diptych.data.jsonl import JsonlSource
from diptych.data.loss_masks import LossMasks, read_mask
from diptych.data.parquet import ParquetSource
from diptych.data.reading import Reading
from diptych.data.report import sheet
from diptych.data.source import BadItem, ItemDraws, Source
from diptych.data.variations import Variations, Varied
from diptych.data.webdataset import WebDatasetSource

MASKED = Reading(masks=LossMasks())
OPTIONAL = Reading(masks=LossMasks(missing="full_weight"))


def png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(file, "png")
    return file.getvalue()


def ramp(height: int, width: int) -> np.ndarray:
    """A picture that is brighter to the right and downwards, so that each place is told from its neighbours."""
    rows, columns = np.mgrid[:height, :width]
    return 30 + 100 * (rows + 0.5) / height + 100 * (columns + 0.5) / width


def mask_of(values: np.ndarray, size: tuple[int, int], mode: FitMode = "crop", **options: Any) -> torch.Tensor:
    image = (values.shape[0], values.shape[1])
    return read_mask(png(values), "frog", masks=LossMasks(**options), image=image, size=size, fit_mode=mode)


def test_by_hand() -> None:
    values = np.array([[255, 255, 0, 0], [255, 0, 0, 0], [51, 51, 102, 102], [51, 51, 102, 102]])
    expected = torch.tensor([[[0.75, 0.0], [0.2, 0.4]]])
    torch.testing.assert_close(mask_of(values, (2, 2)), expected)
    torch.testing.assert_close(mask_of(values, (2, 2), unmasked_weight=0.5), 0.5 + 0.5 * expected)
    wide = np.repeat(np.array([[0, 255, 255, 0]]), 2, axis=0)  # 2 rows, 4 columns
    assert torch.equal(mask_of(wide, (2, 2)), torch.ones(1, 2, 2))  # the middle is kept
    assert torch.equal(mask_of(wide, (2, 2), "stretch"), torch.full((1, 2, 2), 0.5))
    boxed = mask_of(np.full((2, 4), 255), (4, 4), "letterbox")
    assert boxed[0].tolist() == [[0] * 4, [1] * 4, [1] * 4, [0] * 4]  # what is put around the image counts nothing


@given(
    st.integers(8, 90),
    st.integers(8, 90),
    st.sampled_from([(16, 16), (32, 16), (16, 48), (64, 64)]),
    st.sampled_from(["crop", "letterbox", "stretch"]),
    st.sampled_from([1, 2, 3]),
)
def test_a_mask_lies_where_its_image_lies(height: int, width: int, size: Any, mode: Any, finer: int) -> None:
    """A grey picture is its own mask: both must show the same at each place, from files of any two resolutions."""
    image = Image.fromarray(ramp(height, width).astype(np.uint8)).convert("RGB")
    shown = (fit(image, size, mode).mean(0) + 1) / 2  # (H, W)
    mask = read_mask(
        png(ramp(finer * height, finer * width)),
        "a",
        masks=LossMasks(),
        image=(height, width),
        size=size,
        fit_mode=mode,
    )[0]
    inside = mask > 0
    assert inside.any()
    assert mode == "letterbox" or inside.all()
    assert (shown[~inside] == 1).all()
    step = 120 / 255 / min(height, width) + 0.03  # a source pixel, and rounding
    assert (shown - mask)[inside].abs().max() <= step


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(np.repeat(ramp(48, 64)[:, :, None], 3, axis=2)))
        (tmp_path / f"{number}.mask.png").write_bytes(png(ramp(48, 64)))
        (tmp_path / f"{number}.txt").write_text("a ramp")
    return tmp_path


def rows(folder: Path, **extra: Any) -> Path:
    file = folder / "rows.jsonl"
    lines = [{"image": f"{n}.png", "mask": f"{n}.mask.png", "text": "a ramp", **extra} for n in range(3)]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


def shard(folder: Path) -> Path:
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(3):
            for suffix in ("png", "mask.png", "txt"):
                tar.add(folder / f"{number}.{suffix}", f"{number}.{suffix}")
    return folder / "a.tar"


def parquet(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    table = {
        "image": [(folder / f"{number}.png").read_bytes() for number in range(3)],
        "mask": [(folder / f"{number}.mask.png").read_bytes() for number in range(3)],
        "text": ["a ramp"] * 3,
    }
    datasets.Dataset.from_dict(table).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def source_of(kind: str, folder: Path, reading: Reading | None, task: str = "text_to_image") -> Source:
    if kind == "folder":
        return FolderSource(folder, task=task, reading=reading)
    if kind == "jsonl":
        return JsonlSource(rows(folder), task=task, reading=reading)
    if kind == "webdataset":
        return WebDatasetSource(shard(folder), task=task, reading=reading)
    return ParquetSource(parquet(folder), task=task, reading=reading, cache=folder / "cache")


@pytest.mark.parametrize("kind", ["folder", "jsonl", "webdataset", "parquet"])
def test_every_source_reads_them(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_INDEX", str(folder / ".index"))
    source = source_of(kind, folder, MASKED)
    assert len(source) == 3
    for index in range(3):
        sample = source.load(index, ItemDraws(index), (32, 32))
        assert sample.image is not None
        assert sample.loss_mask is not None
        assert sample.loss_mask.shape == (1, 32, 32)
        torch.testing.assert_close(sample.loss_mask[0], (sample.image.mean(0) + 1) / 2, atol=0.03, rtol=0)
    if kind != "jsonl":  # whose rows say everything that they hold
        assert source_of(kind, folder, None).load(0, ItemDraws(0), (32, 32)).loss_mask is None


@given(st.integers(0, 2**63), st.booleans(), st.sampled_from([0.0, 0.3]))
def test_flips_and_crops_take_it_along(ramps: Path, visit: int, flip: bool, crop: float) -> None:
    source = Varied(FolderSource(ramps, task="image", reading=MASKED), Variations(flip=flip, crop=crop))
    sample = source.load(0, ItemDraws(visit), (16, 16))
    assert sample.image is not None
    assert sample.loss_mask is not None
    torch.testing.assert_close(sample.loss_mask[0], (sample.image.mean(0) + 1) / 2, atol=0.04, rtol=0)


@pytest.fixture(scope="module")
def ramps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ramps")
    (folder / "a.png").write_bytes(png(np.repeat(ramp(48, 48)[:, :, None], 3, axis=2)))
    (folder / "a.mask.png").write_bytes(png(ramp(48, 48)))
    return folder


def test_crops_keep_to_where_something_is_learned(tmp_path: Path) -> None:
    """Nine tenths of this mask are black: each visit is cut where some of it is white, or the item is refused."""
    values = np.zeros((100, 100))
    values[:10, :10] = 255
    (tmp_path / "a.png").write_bytes(png(np.repeat(ramp(100, 100)[:, :, None], 3, axis=2)))
    (tmp_path / "a.mask.png").write_bytes(png(values))
    source = Varied(FolderSource(tmp_path, task="image", reading=MASKED), Variations(crop=1.0))
    found = 0
    for visit in range(40):
        try:
            mask = source.load(0, ItemDraws(visit), (32, 32)).loss_mask
        except BadItem:  # "16 random crops"
            continue
        assert mask is not None
        assert mask.any()
        found += 1
    assert found > 20


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros((48, 64)), "black everywhere"),
        (np.full((64, 48), 255), "another shape than its image (48x64, 64x48)"),
        (np.stack([np.full((48, 64), 255), np.zeros((48, 64)), np.zeros((48, 64))], axis=2), "in colour"),
        (np.stack([np.full((48, 64), level) for level in (255, 255, 255, 90)], axis=2), "transparent somewhere"),
    ],
)
def test_what_is_no_mask_is_named(folder: Path, values: np.ndarray, said: str) -> None:
    (folder / "1.mask.png").write_bytes(png(values))
    source = FolderSource(folder, task="text_to_image", reading=MASKED)
    source.load(0, ItemDraws(0), (32, 32))
    with pytest.raises(BadItem, match=said.replace("(", r"\(").replace(")", r"\)")) as caught:
        source.load(1, ItemDraws(0), (32, 32))
    assert caught.value.id.endswith("/1.png")


def test_opaque_masks_with_an_alpha_channel_are_read(folder: Path) -> None:
    values = np.stack([ramp(48, 64)] * 3 + [np.full((48, 64), 255)], axis=2)
    (folder / "1.mask.png").write_bytes(png(values))
    source = FolderSource(folder, task="text_to_image", reading=MASKED)
    assert source.load(1, ItemDraws(0), (32, 32)).loss_mask is not None


def test_a_mask_that_is_black_where_the_image_is_kept(folder: Path) -> None:
    values = np.zeros((48, 64))
    values[:, :4] = 255  # cut away by the square
    (folder / "1.mask.png").write_bytes(png(values))
    source = FolderSource(folder, task="text_to_image", reading=MASKED)
    with pytest.raises(BadItem, match="black in what is kept of the image at 32x32"):
        source.load(1, ItemDraws(0), (32, 32))


def test_a_missing_mask_is_an_error_or_counts_in_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_INDEX", str(folder / ".index"))
    tables = {"webdataset": shard(folder), "jsonl": rows(folder)}
    (folder / "1.mask.png").unlink()
    with pytest.raises(UserError, match=r"1 of 3 images have no loss mask \(the first is 1\.png, .* 1\.mask\.png\)"):
        FolderSource(folder, task="text_to_image", reading=MASKED)
    optional = FolderSource(folder, task="text_to_image", reading=OPTIONAL)
    assert [optional.load(n, ItemDraws(0), (32, 32)).loss_mask is None for n in range(3)] == [False, True, False]
    file = tables["jsonl"]
    file.write_text(file.read_text().replace('"mask": "1.mask.png", ', ""))
    with pytest.raises(UserError, match=r"rows\.jsonl:2: 'mask' is missing"):
        JsonlSource(file, reading=MASKED)
    assert JsonlSource(file, reading=OPTIONAL).load(1, ItemDraws(0), (32, 32)).loss_mask is None
    with tarfile.open(folder / "b.tar", "w") as tar:
        tar.add(folder / "1.png", "1.png")
        tar.add(folder / "1.txt", "1.txt")
    with pytest.raises(BadItem, match="no loss mask"):
        WebDatasetSource(folder / "b.tar", reading=MASKED).load(0, ItemDraws(0), (32, 32))
    table = WebDatasetSource(folder / "b.tar", reading=OPTIONAL)
    assert table.load(0, ItemDraws(0), (32, 32)).loss_mask is None


def test_masks_that_nobody_asked_for_are_not_learned_as_pictures(folder: Path) -> None:
    for task in ("image", "text_to_image"):
        source = FolderSource(folder, task=task)
        assert source.paths == ["0.png", "1.png", "2.png"]
        assert set(source.dropped.values()) == {"a loss mask, which only a source with `masks` reads"}
    with pytest.raises(UserError, match="'mask' is read where the source has `masks`"):
        JsonlSource(rows(folder))
    assert len(JsonlSource(rows(folder), ignore=["mask"])) == 3
    (folder / "other.mask.png").write_bytes(png(ramp(48, 64)))  # a picture of that name, and of no image here
    assert FolderSource(folder, task="image").paths[-1] == "other.mask.png"
    assert "no image of this name" in FolderSource(folder, task="image", reading=MASKED).dropped.values()
    (folder / "0.mask.jpg").write_bytes(png(ramp(48, 64)))
    with pytest.raises(UserError, match="two loss masks of one image"):
        FolderSource(folder, task="image", reading=MASKED)


def test_the_sheet_shows_them(folder: Path) -> None:
    """The mask stands beside its image."""
    masked, plain = (
        FolderSource(folder, task="image", reading=reading).load(0, ItemDraws(0), (32, 32))
        for reading in (MASKED, None)
    )
    assert sheet([masked]).tobytes() != sheet([plain]).tobytes()
