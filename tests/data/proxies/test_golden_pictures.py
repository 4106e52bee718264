"""Every proxy on a toy scene and on two photographs, against pictures that were looked at.

`python tests/data/proxies/test_golden_pictures.py` is not a way to make them: delete one and run the test with
`DIPTYCH_WRITE_GOLDEN=1`, then look at it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diptych.data.imaging import to_pil
from diptych.data.proxies.coco import CocoPictures
from diptych.data.proxies.pictures import ToyPictures
from diptych.data.proxies.source import ProxySource
from diptych.data.proxies.tasks import PROXIES
from diptych.data.source import ItemDraws

GOLDEN = Path(__file__).parents[2] / "golden" / "proxies"
SIDE = 56
LEVELS = 3
"""By how much a pixel may differ: interpolation and JPEG vary a little between releases."""


def sheet(proxy: str, photographs: Path) -> Image.Image:
    """Above what is read, below what is wanted; a toy scene and two photographs."""
    toy = ProxySource(ToyPictures(count=1, seed=3), proxies=proxy, seed=1, name="toy")
    pictures = CocoPictures(
        photographs / "panoptic.json", images=photographs / "images", depth=photographs / "depth", name="photographs"
    )
    photos = ProxySource(pictures, proxies=proxy, seed=1, name="photographs")
    page = Image.new("RGB", (3 * SIDE, 2 * SIDE))
    for column, (source, index) in enumerate([(toy, 0), (photos, 0), (photos, 1)]):
        sample = source.load(index, ItemDraws(0), (SIDE, SIDE))
        assert sample.image is not None
        page.paste(to_pil(sample.context_images[0]), (column * SIDE, 0))
        page.paste(to_pil(sample.image), (column * SIDE, SIDE))
    return page


@pytest.mark.parametrize("proxy", PROXIES)
def test_golden(proxy: str, photographs: Path) -> None:
    found, path = sheet(proxy, photographs), GOLDEN / f"{proxy}.png"
    if os.environ.get("DIPTYCH_WRITE_GOLDEN") and not path.exists():
        found.save(path)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    apart = np.abs(np.asarray(found).astype(int) - expected).max(axis=2)
    assert apart.shape == (2 * SIDE, 3 * SIDE)
    assert (apart > LEVELS).mean() < 0.005, f"{(apart > LEVELS).mean():.1%} of the pixels differ"
