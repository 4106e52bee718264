"""safetensors in and out: sharded, strict, atomic, never a pickle."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diptych.checkpoints.tensors import load_into, own_tensors, read_tensors, weight_files, write_tensors
from diptych.core.errors import UserError
from diptych.core.files import write_folder


class Tied(nn.Module):
    """An output head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)


def tensors(count: int = 5) -> dict[str, torch.Tensor]:
    return {f"layer.{i}": torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(count)}


def test_shards_and_index(tmp_path: Path) -> None:
    values = tensors()
    write_tensors(tmp_path, values.items(), shard_bytes=2 * 4 * 8 * 4)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert {path.name for path in tmp_path.iterdir()} == {*names, "model.safetensors.index.json"}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 4 * 8 * 4
    assert [list(load_file(tmp_path / name)) for name in names] == [
        ["layer.0", "layer.1"],
        ["layer.2", "layer.3"],
        ["layer.4"],
    ]
    assert [path.name for path in weight_files(tmp_path)] == names
    back = dict(read_tensors(weight_files(tmp_path)))
    assert all(torch.equal(back[name], value) for name, value in values.items())
    (tmp_path / names[1]).unlink()
    with pytest.raises(UserError, match=r"shard model-00002-of-00003\.safetensors is missing"):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list in place of a JSON object"):
        weight_files(tmp_path)


def test_files_are_the_same_each_time(tmp_path: Path) -> None:
    """safetensors' own writer orders metadata by chance (docs/surprises.md)."""
    for attempt in range(8):
        write_tensors(tmp_path, tensors().items(), str(attempt))
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


def test_one_file_views_and_dtype(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    counts = torch.tensor([3])
    write_tensors(tmp_path, [("row", whole[1]), ("columns", whole[:, 1:3]), ("n", counts)], "part", torch.bfloat16)
    (file,) = weight_files(tmp_path, "part")
    back = load_file(file)
    assert file.name == "part.safetensors"
    assert back["row"].tolist() == [4, 5, 6, 7]
    assert back["columns"].tolist() == [[1, 2], [5, 6], [9, 10]]
    assert (back["row"].dtype, back["n"].dtype) == (torch.bfloat16, torch.int64)
    assert file.stat().st_size < 400  # a view brings only itself


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_weights_are_written_once_and_stay_tied(device: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = Tied()
    assert list(own_tensors(source)) == [
        "embed.weight",
        *(f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    ]
    write_tensors(tmp_path, own_tensors(source).items())
    with torch.device(device):
        target = Tied()
    load_into(target, read_tensors(weight_files(tmp_path)), "x")
    assert target.head.weight is target.embed.weight
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name
    load_into(target, [(name.replace("embed", "head"), value + 1) for name, value in own_tensors(source).items()], "x")
    assert torch.equal(target.embed.weight, source.embed.weight + 1)


def test_strict_loading_names_what_does_not_fit() -> None:
    source = dict(own_tensors(Tied()))
    target = Tied()
    missing = {name: value for name, value in source.items() if not name.endswith(("bias", "running_mean"))}
    with pytest.raises(UserError, match=r"^here: weights do not fit: 2 missing \(norm.bias, norm.running_mean\)$"):
        load_into(target, missing.items(), "here")
    with pytest.raises(UserError, match=r"1 missing \(norm.bias\); 1 unexpected \(norm.bais\); norm.bais may be"):
        load_into(target, [(name.replace("bias", "bais"), value) for name, value in source.items()], "here")
    with pytest.raises(UserError, match=r"here: embed.weight has shape \[5, 4\], the model needs \[5, 3\]"):
        load_into(target, [*source.items(), ("embed.weight", torch.zeros(5, 4))], "here")
    with pytest.raises(UserError, match=r"head.scale_weight scales 8-bit weights, which are not read"):
        load_into(target, [*source.items(), ("head.scale_weight", torch.ones(()))], "here")
    load_into(target, missing.items(), "here", optional=lambda name: name.startswith("norm."))
    load_into(
        target,
        [(f"x.{name}", value) for name, value in source.items()],
        "here",
        rename={f"x.{name}": name for name in source},
    )


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"pytorch_model.bin: pickle files can run code .* convert it to .safetensors"):
        weight_files(tmp_path)
    with pytest.raises(UserError, match="pickle files can run code"):
        list(read_tensors([tmp_path / "pytorch_model.bin"]))
    disguised = tmp_path / "model.safetensors"
    (tmp_path / "pytorch_model.bin").rename(disguised)
    with pytest.raises(UserError, match=r"model.safetensors: not a readable safetensors file"):
        list(read_tensors(weight_files(tmp_path)))
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(UserError, match=r"no model.safetensors here"):
        weight_files(tmp_path / "gone")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder that a new one shall replace."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "file").write_text("old")
    return folder


@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_weights_are_as_readable_as_the_umask_says(tmp_path: Path, umask: int, rights: int) -> None:
    before = os.umask(umask)
    try:
        write_folder(tmp_path / "model", lambda folder: write_tensors(folder, [("w", torch.zeros(3))]))
    finally:
        os.umask(before)
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == rights
