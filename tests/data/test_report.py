from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data as pictures

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.prepared import Prepared, Preparer
from diptych.core.sample import Sample
from diptych.data.folder import FolderSource
from diptych.data.report import inspect, sheet
from diptych.data.source import ItemDraws
from diptych.data.toyworld import ToyWorldSource


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("astronaut", "coffee", "chelsea"):
        Image.fromarray(getattr(pictures, name)()).resize((60, 40)).save(folder / f"{name}.jpg")
        (folder / f"{name}.txt").write_text(f"a picture of {name}")
    return folder


def test_inspect_counts_and_names(photos: Path) -> None:
    (photos / "broken.jpg").write_bytes((photos / "coffee.jpg").read_bytes()[:400])
    (photos / "broken.txt").write_text("half a coffee")
    (photos / "silent.png").write_bytes(b"junk")
    done: list[int] = []
    report = inspect(FolderSource(photos, task="text_to_image"), (16, 16), progress=done.append)
    assert report.usable == 3
    assert list(report.bad) == ["photos/broken.jpg"]
    assert report.reasons() == {"truncated or corrupt image": 1, "no caption": 1}
    text = "\n".join(report.lines())
    assert "photos (text_to_image): 4 items, 3 usable" in text
    assert "photos/broken.jpg: truncated or corrupt image (" in text
    assert "photos/silent.png: no caption" in text
    assert done == [1, 2, 3, 4]
    assert report.lines(named=1)[-1] == "    and 1 more"


def test_inspect_a_part_of_several_sources(photos: Path) -> None:
    report = inspect([FolderSource(photos), ToyWorldSource(task="image", count=10**9)], (32, 32), limit=2)
    assert [source.read for source in report.sources] == [2, 2]
    assert report.lines()[1] == "toyworld (image): 1,000,000,000 items, 2 of the 2 read usable"


def test_sheet_shows_every_task(photos: Path) -> None:
    source = FolderSource(photos, task="text_to_image")
    samples = [source.load(index, ItemDraws(0), (40, 60)) for index in range(3)]
    for task in ("edit", "understand", "image"):
        samples.append(ToyWorldSource(task=task, count=5).load(0, ItemDraws(0), (32, 32)))
    page = sheet(samples, columns=4, cell=160)
    assert page.width == 640
    cells = [np.asarray(page)[: page.height // 2, 160 * column : 160 * (column + 1)] for column in range(4)]
    assert all(cell.std() > 10 for cell in cells)


def test_sheet_draws_the_picture_and_its_caption() -> None:
    image = ToyWorldSource(task="image", count=1).load(0, ItemDraws(0), (32, 32)).image
    bare = np.asarray(sheet([Sample(id="x", task="text_to_image", image=image)]))
    told = np.asarray(sheet([Sample(id="x", task="text_to_image", image=image, text="a red circle " * 30)]))
    assert told.shape[0] > bare.shape[0]
    with pytest.raises(UserError, match="at least one"):
        sheet([])


class Refusing(Preparer):
    """Refuses samples by id."""

    def __init__(self, *ids: str) -> None:
        self.ids = ids

    def prepare(self, sample: Sample, draws: Draws) -> Prepared:
        if sample.id in self.ids:
            raise UserError(f"{sample.id}: 1,095 tokens, but the model takes 512")
        return Prepared(id=sample.id, task=sample.task, inputs=(), counts={"flow": 1.0})

    def join(self, rows: Sequence[Prepared]) -> tuple[()]:
        return ()


class RefusingWhatIsKept(Refusing):
    def prepare(self, sample: Sample, draws: Draws) -> Prepared:
        return (
            super().prepare(sample, draws)
            if float(draws.uniform("drop")[0]) >= 0.999
            else Prepared(id=sample.id, task=sample.task, inputs=(), counts={"flow": 1.0})
        )


def test_no_dropout_hides_what_the_system_refuses(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    found = inspect(FolderSource(tmp_path, name="p"), (8, 8), preparer=RefusingWhatIsKept("p/b.png"))
    assert list(found.bad) == ["p/b.png"]


def test_what_the_system_refuses_is_found(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    source = FolderSource(tmp_path, name="p")
    found = inspect(source, (8, 8), preparer=Refusing("p/b.png"))
    assert found.bad == {"p/b.png": "refused by the model (1,095 tokens, but the model takes 512)"}
    assert found.usable == 2
