from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diptych.core.errors import UserError
from diptych.data import parquet
from diptych.data.parquet import ParquetSource
from diptych.data.source import BadItem, ItemDraws

DRAWS = ItemDraws(0)
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def picture(colour: str, size: tuple[int, int] = (20, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def table(path: Path, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_bytes_and_renamed_columns(tmp_path: Path) -> None:
    file = table(tmp_path / "p.parquet", jpg=[picture("red"), picture("blue", (8, 9))], caption=["r", "b"], n=[1, 2])
    source = ParquetSource(file, columns={"image": "jpg", "text": "caption"}, cache=tmp_path / "cache")
    samples = [source.load(index, DRAWS, (8, 8)) for index in range(2)]
    assert [(sample.id, sample.text) for sample in samples] == [("p.parquet:1", "r"), ("p.parquet:2", "b")]
    assert source.sizes().tolist() == [[10, 20], [9, 8]]
    assert source.fingerprint(0) != source.fingerprint(1)
    with pytest.raises(UserError, match=r"unknown column 'jpeg'. Did you mean 'jpg'"):
        ParquetSource(file, columns={"image": "jpeg"}, cache=tmp_path / "cache")
    with pytest.raises(UserError, match=r"unknown column key 'txt'. Did you mean 'text'"):
        ParquetSource(file, columns={"txt": "caption"}, cache=tmp_path / "cache")
    with pytest.raises(UserError, match=r"no column 'image'.*Columns: jpg, caption, n"):
        ParquetSource(file, cache=tmp_path / "cache")


def test_image_feature_of_datasets(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "parts").mkdir()
    made = datasets.Dataset.from_dict(
        {"image": [{"bytes": picture("red"), "path": None}, {"bytes": b"junk", "path": None}], "text": ["r", "j"]},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    made.to_parquet(tmp_path / "parts" / "0.parquet")
    source = ParquetSource(tmp_path / "parts", cache=tmp_path / "cache")
    image = source.load(0, DRAWS, (8, 8)).image
    assert image is not None
    assert image[0].min() == 1
    with pytest.raises(BadItem, match="parts:2: not an image"):
        source.load(1, DRAWS, (8, 8))


def test_paths_without_bytes(tmp_path: Path) -> None:
    """What `datasets` writes of pictures that it knows by path: relative to the given folder."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "red.png").write_bytes(picture("red"))
    rows = [{"bytes": None, "path": "red.png"}, {"bytes": None, "path": "gone.png"}]
    file = table(tmp_path / "rows.parquet", image=rows)
    source = ParquetSource(file, task="image", folder=tmp_path / "pictures", cache=tmp_path / "cache")
    image = source.load(0, DRAWS, (8, 8)).image
    assert image is not None
    assert image[0].min() == 1
    with pytest.raises(BadItem, match=r"rows\.parquet:2.*gone\.png"):
        source.load(1, DRAWS, (8, 8))


def test_edit_and_conversation(tmp_path: Path) -> None:
    Image.new("RGB", (6, 6)).save(tmp_path / "x.png")
    talk = [[{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "red"}]]
    file = table(
        tmp_path / "p.parquet", image=["x.png"], instruction=["do"], sources=[[picture("red")]], conversations=talk
    )
    edit = ParquetSource(file, task="edit", cache=tmp_path / "cache").load(0, DRAWS, (8, 8))
    assert edit.text == "do"
    assert edit.context_images[0][0].min() == 1
    spoken = ParquetSource(file, task="understand", cache=tmp_path / "cache").load(0, DRAWS, (8, 8))
    assert spoken.messages[1].text == "red"
    assert len(spoken.context_images) == 1


def test_null_cells_are_bad_items(tmp_path: Path) -> None:
    source = ParquetSource(
        table(tmp_path / "p.parquet", image=[None, picture("red")], text=["a", None]), cache=tmp_path
    )
    with pytest.raises(BadItem, match=r"p.parquet:1: 'image' is missing"):
        source.load(0, DRAWS, (8, 8))
    with pytest.raises(BadItem, match=r"p.parquet:2: 'text' is missing"):
        source.load(1, DRAWS, (8, 8))
    assert source.sizes().tolist() == [[0, 0], [10, 20]]


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match=r"broken.parquet: not readable as parquet") as caught:
        ParquetSource(tmp_path / "broken.parquet", cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such parquet file"):
        ParquetSource(tmp_path / "none.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.parquet file"):
        ParquetSource(tmp_path / "empty")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `datasets` loads as it would a repository of the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parquet, "_files", lambda item: [])
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    return folder


def test_a_data_set_of_the_hub(repository: Path, tmp_path: Path) -> None:
    table(repository / "train.parquet", image=[picture("red")], text=["r"])
    source = ParquetSource("owner/name", cache=tmp_path / "cache")
    assert source.load(0, DRAWS, (8, 8)).text == "r"


def test_tars_of_the_hub_are_not_read_by_a_library_that_drops_fields(repository: Path, tmp_path: Path) -> None:
    with tarfile.open(repository / "train.tar", "w") as shard:
        for name, data in [("0.png", picture("red")), ("0.txt", b"r")]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    with pytest.raises(UserError, match=r"owner/name: a data set of tar files, .* kind: webdataset"):
        ParquetSource("owner/name", columns={"image": "png", "text": "txt"}, cache=tmp_path / "cache")


def test_without_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'diptych\[data\]'"):
        ParquetSource(table(tmp_path / "p.parquet", image=[picture("red")]), task="image")


@pytest.mark.parametrize(
    "heights",
    [
        [16, None, 0, -3],
        [16.0, float("nan"), 0.0, float("inf")],
        ["16", "", "tall", None],
        [True, False, None, True],
        [16.0, 15.5, 1e300, None],
    ],
    ids=["null", "nan", "text", "bool", "fraction"],
)
def test_sizes_that_are_no_pixels_are_read_from_the_picture(heights: list[Any], tmp_path: Path) -> None:
    data = picture("red", (8, 16))
    file = table(tmp_path / "p.parquet", image=[data] * 4, text=["a"] * 4, width=[8] * 4, height=heights)
    assert ParquetSource(file, cache=tmp_path / "cache").sizes().tolist() == [[16, 8]] * 4


def test_sizes_in_columns_are_trusted_and_spare_the_headers(tmp_path: Path) -> None:
    file = table(tmp_path / "p.parquet", image=[b"junk"] * 2, text=["a"] * 2, width=[30, 30.0], height=[20, 0])
    assert ParquetSource(file, cache=tmp_path / "cache").sizes().tolist() == [[20, 30], [0, 0]]
