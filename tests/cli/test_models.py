"""Commands that open a model: what they write, and what they say of models that are none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.cli.main import main
from diptych.recipes import names


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (40, 32), "red").save(tmp_path / "in.png")
    return "in.png"


def opened(path: Path | str) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def test_generate_into_a_folder(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tiny_model), "a red circle", "--n", "2", "--seed", "5", "-o", "out"]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert files == [Path("out/a-red-circle-1.png"), Path("out/a-red-circle-2.png")]
    first, second = (opened(file) for file in files)
    assert first.size == (32, 32)
    assert first.tobytes() != second.tobytes()
    assert first.info["prompt"] == "a red circle"
    assert not list(Path("out").glob(".*"))


def test_generate_one_file_of_another_shape(tiny_model: Path) -> None:
    assert (
        main(["generate", str(tiny_model), "a red circle", "--size", "16x40", "--solver", "heun", "-o", "a.png"]) == 0
    )
    assert opened("a.png").size == (40, 16)


def test_edit_and_ask(tiny_model: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edit", str(tiny_model), picture, "make it blue", "--image-cfg", "1.5", "-o", "e.png"]) == 0
    assert opened("e.png").size == (40, 32)
    assert main(["ask", str(tiny_model), picture, picture, "yes no?", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("e.png\n")


def test_eval(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["eval", str(tiny_model), "--tasks", "toyeval,toyvqa", "--limit", "6", "--n", "1", "--output", "s"]) == 0
    )
    found = json.loads(Path("s/results.json").read_text())
    assert found["tasks"]["toyeval"]["prompts"] == 6
    assert "color_attribution" in capsys.readouterr().out


def test_pack(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(tiny_model), "small"]) == 0
    assert {tensor.dtype for tensor in load_file("small/model.safetensors").values()} == {torch.float16}
    assert json.loads(Path("small/config.json").read_text())["sampling"]["steps"] == 2
    assert main(["generate", "small", "a red circle", "-o", "p.png"]) == 0
    assert main(["pack", str(tiny_model), "small"]) == 2
    assert "exists already" in capsys.readouterr().err


def changed(model: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """A copy of the model, its weights changed."""
    shutil.copytree(model, "bad")
    tensors = load_file("bad/model.safetensors")
    change(tensors)
    save_file(tensors, "bad/model.safetensors")


def fails(capsys: pytest.CaptureFixture[str], *, model: str = "bad", arguments: tuple[str, ...] = ()) -> str:
    """The line that `generate` fails with; nothing is written."""
    assert main(["generate", model, "a red circle", "-o", "out", *arguments]) == 2
    assert not Path("out").exists()
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("diptych: error: ")
    return line


def test_a_folder_that_is_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad").mkdir()
    assert "bad: no model here" in fails(capsys)
    Path("bad/config.json").write_text("{")
    assert "not JSON" in fails(capsys)
    Path("bad/config.json").write_text('{"model_type": "internv"}')
    assert "Did you mean 'internvl'?" in fails(capsys)


def test_an_unknown_shipped_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown shipped model 'toy/iom'" in fails(capsys, model="toy/iom")


def test_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def unreachable(*args: object, **options: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(names, "snapshot_download", unreachable)
    assert "someone/model: the hub cannot be reached" in fails(capsys, model="someone/model")


def test_pickled_weights(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny_model, "bad")
    Path("bad/model.safetensors").rename("bad/pytorch_model.bin")
    line = fails(capsys)
    assert "pytorch_model.bin" in line
    assert "pickle" in line


def test_missing_keys(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(tiny_model, lambda tensors: tensors.__delitem__("conditioner.queries"))
    assert "1 missing (conditioner.queries)" in fails(capsys)


def test_unexpected_keys(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(tiny_model, lambda tensors: tensors.update({"decoder.stray": torch.zeros(1)}))
    assert "1 unexpected (decoder.stray)" in fails(capsys)


def test_wrong_shapes(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(tiny_model, lambda tensors: tensors.update({"conditioner.queries": torch.zeros(5, 32)}))
    assert "conditioner.queries has shape [5, 32], the model needs [4, 32]" in fails(capsys)


def test_a_truncated_file(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny_model, "bad")
    path = Path("bad/model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a readable safetensors file" in fails(capsys)


def test_requests_that_cannot_be_met(tiny_model: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_model)
    assert "size 30x30 is not divisible by 8" in fails(capsys, model=model, arguments=("--size", "30"))
    assert "unknown solver 'eulr'" in fails(capsys, model=model, arguments=("--solver", "eulr"))
    assert "steps must be at least 1" in fails(capsys, model=model, arguments=("--steps", "0"))
    assert "--device cuda:99" in fails(capsys, model=model, arguments=("--device", "cuda:99"))
    assert main(["generate", model, "red " * 400, "-o", "out"]) == 2
    assert "would be cut" in capsys.readouterr().err
    assert main(["ask", model, picture, " "]) == 2
    Path("not.png").write_text("text")
    assert main(["edit", model, "not.png", "make it red"]) == 2
    assert "not.png" in capsys.readouterr().err
