"""What varies from visit to visit: captions and images, as the recipe says, by the visit's key alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diptych.core.errors import UserError
from diptych.core.schema import read
from diptych.data.folder import FolderSource
from diptych.data.source import ItemDraws
from diptych.data.variations import Variations, Varied, varied_text

TAGS = "frog, stone, moss, dawn"


def texts(text: str, count: int = 200, **values: Any) -> Counter[str]:
    return Counter(varied_text(text, Variations(**values), ItemDraws(number)) for number in range(count))


def test_captions() -> None:
    assert texts("a frog", trigger="sks") == {"sks, a frog": 200}
    assert texts("a SKS frog", trigger="sks") == {"a SKS frog": 200}
    assert texts("one\n\n two \n", lines=True).keys() == {"one", "two"}
    dropped = texts("a frog", trigger="sks", caption_dropout=0.25)
    assert dropped.keys() == {"", "sks, a frog"}
    assert 25 < dropped[""] < 80
    assert texts("a frog", caption_dropout=1.0) == {"": 200}


@given(st.integers(0, 2**63), st.integers(0, 5))
def test_shuffled_tags_are_the_same_tags(number: int, kept: int) -> None:
    shuffled = varied_text(TAGS, Variations(shuffle_tags=True, keep_tags=kept), ItemDraws(number)).split(", ")
    assert sorted(shuffled) == sorted(TAGS.split(", "))
    assert shuffled[:kept] == TAGS.split(", ")[:kept]


def test_every_order_comes_up() -> None:
    assert len(texts(TAGS, 400, shuffle_tags=True)) == 24
    assert len(texts(TAGS, 400, shuffle_tags=True, keep_tags=1)) == 6


@pytest.fixture
def folder(tmp_path: Path) -> FolderSource:
    image = Image.new("RGB", (40, 40))
    for x in range(40):
        for y in range(40):
            image.putpixel((x, y), (6 * x, 6 * y, 0))
    image.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(TAGS)
    return FolderSource(tmp_path, task="text_to_image", name="p")


def test_images_are_mirrored_and_cut(folder: FolderSource) -> None:
    plain = folder.load(0, ItemDraws(0), (40, 40)).image
    assert plain is not None
    seen: Counter[str] = Counter()
    for number in range(40):
        image = Varied(folder, Variations(flip=True)).load(0, ItemDraws(number), (40, 40)).image
        assert image is not None
        seen["plain" if torch.equal(image, plain) else "mirrored"] += 1
        assert torch.equal(image, plain) or torch.equal(image.flip(-1), plain)
    assert min(seen["plain"], seen["mirrored"]) > 8
    corners: set[tuple[float, float]] = set()
    for number in range(60):
        image = Varied(folder, Variations(crop=0.25)).load(0, ItemDraws(number), (32, 32)).image
        assert image is not None
        assert image.shape == (3, 32, 32)
        left, top = (image[0, 0, 0].item() + 1) * 127.5 / 6, (image[1, 0, 0].item() + 1) * 127.5 / 6
        assert image[0, 0, 31].item() > image[0, 0, 0].item()
        corners.add((round(left), round(top)))
    assert {left for left, _ in corners} == {top for _, top in corners} == set(range(9))


def test_a_visit_is_a_function_of_its_key(folder: FolderSource) -> None:
    varied = Varied(folder, Variations(flip=True, crop=0.2, shuffle_tags=True, caption_dropout=0.3))
    first, again = (varied.load(0, ItemDraws(7), (32, 32)) for _ in range(2))
    assert first.text == again.text
    assert first.image is not None
    assert again.image is not None
    assert torch.equal(first.image, again.image)


def test_what_has_no_use(folder: FolderSource, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task image has no captions"):
        Varied(FolderSource(tmp_path, name="p"), Variations(trigger="sks"))
    with pytest.raises(UserError, match="keep_tags goes with shuffle_tags"):
        read(Variations, {"keep_tags": 1}, "vary")
    with pytest.raises(UserError, match="crop"):
        read(Variations, {"crop": 2}, "vary")
    assert Variations(trigger="a", flip=True, caption_dropout=0.5).held_out() == Variations(trigger="a")
