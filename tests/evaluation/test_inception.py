"""FID's network agrees with torch-fidelity's, and FID on a small data set comes out of the harness."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diptych.core.draws import key
from diptych.core.errors import UserError
from diptych.evaluation import download, feature_tasks, frechet, inception
from diptych.evaluation.download import Data, File
from diptych.evaluation.evaluate import evaluate
from diptych.evaluation.feature_tasks import MJHQ, square
from diptych.evaluation.inception import Inception, load_inception
from diptych.evaluation.task import Tools

GOLDEN = Path(__file__).parent.parent / "golden" / "inception"
Write = Callable[[str, dict[str, str]], Path]


def fill(network: Inception) -> None:
    """Random weights that depend on their names alone."""
    for name, value in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(key("inception", name)))
        if name.endswith("conv.weight"):
            noise = noise * math.sqrt(2 / value[0].numel())
        elif name.endswith("bn.weight"):
            noise = 1 + 0.1 * noise
        elif name.endswith("running_var"):
            noise = 0.5 + noise.abs()
        else:
            noise = 0.1 * noise
        value.copy_(noise)


def test_parity_with_torch_fidelity() -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = {"tall": (2, 3, 40, 24), "large": (1, 3, 310, 320)}
    network = Inception()
    fill(network)
    expected = load_file(GOLDEN / "features.safetensors")
    for name, shape in shapes.items():
        pictures = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        with torch.no_grad():
            torch.testing.assert_close(network(pictures), expected[name], rtol=1e-5, atol=1e-5)


def test_weights_come_in_safely(tmp_path: Path) -> None:
    network = Inception()
    fill(network)
    torch.save({**network.state_dict(), "fc.weight": torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="not the published weights"):
        load_inception(tmp_path / "weights.pth", tmp_path)
    kept = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(kept, tmp_path / "weights.safetensors")
    again = load_inception(tmp_path / "weights.safetensors", tmp_path)
    assert torch.equal(again.Mixed_7c.branch_pool.conv.weight, network.Mixed_7c.branch_pool.conv.weight)
    kept.pop("Mixed_5b.branch1x1.conv.weight")
    save_file(kept, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"1 missing \(Mixed_5b.branch1x1.conv.weight\)"):
        load_inception(tmp_path / "less.safetensors", tmp_path)
    with pytest.raises(UserError, match="is missing; it is published at"):
        load_inception(None, tmp_path / "nothing", online=False)


def test_fid_from_pictures_to_results(tmp_path: Path, bench_data: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 8
    entries = {f"id{n}": {"prompt": f"picture {n}", "category": "cat" if n % 2 else "dog"} for n in range(count)}
    data = bench_data("mjhq_fid", {"meta_data.json": json.dumps(entries)})
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(data / "mjhq_fid" / "mjhq30k_imgs.zip", "w") as archive:
        for n in range(count):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(buffer, "PNG")
            archive.writestr(f"mjhq30k_imgs/cat/id{n}.png", buffer.getvalue())
    extra = File(url="https://nowhere.invalid/mjhq30k_imgs.zip", sha256=None, licence="none")
    monkeypatch.setitem(download.FILES, "mjhq_fid", (*download.FILES["mjhq_fid"], extra))
    monkeypatch.setattr(MJHQ, "count", count)
    calls: list[int] = []

    def thin(path: Path | None, folder: Path, *, online: bool = True) -> Inception:
        network = Inception(narrow=16)
        fill(network)
        calls.append(1)
        return network

    monkeypatch.setattr(feature_tasks, "load_inception", thin)
    images = tmp_path / "images"
    for n, (name, entry) in enumerate(entries.items()):
        path = images / entry["category"] / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32 + n % 2, 3), dtype=np.uint8)).save(path)
    tools = Tools(data=Data(folder=data, online=False), batch_size=3)
    (images / "dog" / "id4.png").rename(tmp_path / "id4.png")
    found = evaluate(None, ["mjhq_fid"], output=tmp_path / "out", images=images, tools=tools)["tasks"]["mjhq_fid"]
    assert (found["overall"], found["missing"], found["comparable"]) == (None, 1, False)
    (tmp_path / "id4.png").rename(images / "dog" / "id4.png")
    found = evaluate(None, ["mjhq_fid"], output=tmp_path / "out", images=images, tools=tools)["tasks"]["mjhq_fid"]
    network = thin(None, tmp_path)
    paths = [images / entry["category"] / f"{name}.png" for name, entry in entries.items()]
    fake = feature_tasks.featured(network, [square(Image.open(path)) for path in paths])
    with zipfile.ZipFile(data / "mjhq_fid" / "mjhq30k_imgs.zip") as archive:
        real = feature_tasks.featured(network, [square(Image.open(archive.open(name))) for name in archive.namelist()])
    assert found["overall"] == pytest.approx(frechet.fid(real, fake), rel=1e-4)
    assert found["comparable"]
    assert fake.shape == (count, inception.Inception(narrow=16)(torch.zeros(1, 3, 9, 9)).shape[1])
    before = len(calls)
    evaluate(None, ["mjhq_fid"], output=tmp_path / "out", images=images, tools=tools)
    assert len(calls) == before, "features and the real pictures' moments are kept"
