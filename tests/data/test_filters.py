"""Filters of Sec. 4.1: aspect ratio from headers, scores from columns or from a scorer's file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from diptych.core.errors import UserError
from diptych.core.schema import read
from diptych.data.filters import Filters, filtered, read_scores, score_items
from diptych.data.folder import FolderSource
from diptych.data.jsonl import JsonlSource
from diptych.data.source import ItemDraws

SIZES = [(40, 40), (100, 40), (101, 40), (40, 100), (40, 120)]
ROWS = [(0.1, 0.5), (0.5, 0.45), (0.2, 0.9), (0.6, 0.9), (0.1, 0.44)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines: list[str] = []
    for number, ((width, height), (watermark, clip)) in enumerate(zip(SIZES, ROWS, strict=True)):
        Image.new("RGB", (width, height), (50 * number, 0, 0)).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "text": "x", "watermark": watermark, "clip": clip}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return tmp_path


def pairs(folder: Path) -> JsonlSource:
    return JsonlSource(folder / "pairs.jsonl", ignore=["watermark", "clip"])


def reds(source: FolderSource | JsonlSource, filters: Filters) -> list[int]:
    kept = filtered(source, filters)
    images = [kept.load(index, ItemDraws(0), (16, 16)).image for index in range(len(kept))]
    return [round(float((image[0].mean() + 1) * 127.5) / 50) for image in images if image is not None]


def test_limits_are_those_of_the_paper(folder: Path) -> None:
    source = pairs(folder)
    assert reds(source, Filters(max_aspect=2.5)) == [0, 1, 3]
    assert reds(source, Filters(max_watermark=0.5)) == [0, 1, 2, 4]
    assert reds(source, Filters(min_clip=0.45)) == [0, 1, 2, 3]
    every = filtered(source, Filters(max_aspect=2.5, max_watermark=0.5, min_clip=0.45))
    assert len(every) == 2
    assert set(every.dropped.values()) == {
        "aspect ratio 2.52 above 2.5",
        "watermark score 0.6 above 0.5",
        "aspect ratio 3.00 above 2.5",
    }


def test_small_images_are_left_out(tmp_path: Path) -> None:
    for number, size in enumerate(((8, 40), (16, 16), (40, 17))):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    kept = filtered(FolderSource(tmp_path, name="p"), Filters(min_side=16))
    assert (len(kept), dict(kept.dropped)) == (2, {"p:1": "short side 8 below 16"})
    with pytest.raises(UserError, match="min_side"):
        read(Filters, {"min_side": 0}, "filters")


def test_a_scorer_writes_what_the_filter_reads(folder: Path) -> None:
    source, file = FolderSource(folder, name="pictures"), folder / "scores.json"
    calls: list[str] = []

    def red(image: Tensor, text: str) -> float:
        calls.append(text)
        return float((image[0].mean() + 1) / 2)

    score_items(source, {"clip": red}, file, (8, 8), every=2)
    assert reds(source, Filters(min_clip=0.5, scores=str(file))) == [3, 4]
    assert len(calls) == 5
    score_items(source, {"clip": red, "watermark": lambda image, text: 0.0}, file, (8, 8))
    assert len(calls) == 5  # what is there is not scored anew
    assert all(set(row) == {"clip", "watermark"} for row in read_scores(file).values())
    assert torch.is_tensor(source.load(0, ItemDraws(0), (8, 8)).image)


def test_what_is_wrong_is_said(folder: Path) -> None:
    with pytest.raises(UserError, match=r"max_aspect 0\.5"):
        Filters(max_aspect=0.5)
    with pytest.raises(UserError, match="scores is read by"):
        Filters(scores="x.json")
    with pytest.raises(UserError, match="no score columns"):
        filtered(FolderSource(folder), Filters(min_clip=0.4))
    with pytest.raises(UserError, match="no such file of scores"):
        filtered(FolderSource(folder), Filters(min_clip=0.4, scores=str(folder / "none.json")))
    (folder / "half.json").write_text('{"p:1": {"clip": 0.5}}')
    with pytest.raises(UserError, match="p:2: no clip score"):
        filtered(FolderSource(folder, name="p"), Filters(min_clip=0.4, scores=str(folder / "half.json")))
    with pytest.raises(UserError, match="leave nothing"):
        filtered(pairs(folder), Filters(min_clip=2.0))
