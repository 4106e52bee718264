"""A published checkpoint that is one pickle becomes a MODEL that draws what the model drew that it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from diptych.checkpoints.openuni import openuni_tensors
from diptych.checkpoints.pickles import to_safetensors
from diptych.cli.main import main
from diptych.core.errors import UserError
from diptych.inference.engine import Engine
from diptych.recipes.build import build_system
from diptych.recipes.load import load
from diptych.recipes.recipe import parse


@pytest.fixture
def plain(tiny_plain: dict[str, Any]) -> dict[str, Any]:
    """A recipe of a tiny OpenUni."""
    tiny_plain["system"] |= {
        "condition": "queries",
        "flow": {"prediction": "velocity"},
        "connector": {"kind": "openuni", "config": {"hidden": 32, "mlp": 16, "heads": 2, "layers": 1}},
        "decoder": {
            "kind": "sana",
            "config": {
                "in_channels": 3, "out_channels": 3, "num_attention_heads": 2, "attention_head_dim": 8,
                "num_layers": 1, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8,
                "cross_attention_dim": 16, "caption_channels": 16, "sample_size": 32,
            },
        },
    }  # fmt: skip
    return tiny_plain


@pytest.fixture
def recipe(plain: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "openuni.yaml"
    path.write_text("# A tiny OpenUni.\n# not run\n" + yaml.safe_dump(plain, sort_keys=False))
    return path


@pytest.fixture
def original(plain: dict[str, Any]) -> Engine:
    torch.manual_seed(5)
    system = build_system(parse(plain).system)
    for parameter in system.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Engine(system, parse(plain).sampling)


@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_becomes_a_model(nested: bool, original: Engine, recipe: Path, tmp_path: Path) -> None:
    weights = {name: tensor.detach() for name, tensor in openuni_tensors(original.system)}
    torch.save({"state_dict": weights, "step": 3} if nested else weights, tmp_path / "openuni.pth")
    out = tmp_path / "models" / "openuni"
    assert main(["convert", str(tmp_path / "openuni.pth"), str(out), "--recipe", str(recipe)]) == 0
    made = load(str(out))
    assert made.sampling == original.sampling
    prompts = ["a red circle", "two"]
    ours, theirs = (np.stack([np.asarray(x) for x in engine.generate(prompts)]) for engine in (made, original))
    assert np.array_equal(ours, theirs)
    assert ours.std() > 10
    assert not list(out.parent.glob(".diptych*"))


def test_parts_that_are_not_in_the_file_stay_referred_to(
    original: Engine, recipe: Path, tmp_path: Path, tiny_mllm: Path
) -> None:
    torch.save(
        {name: x.detach() for name, x in openuni_tensors(original.system) if not name.startswith("lmm.")},
        tmp_path / "openuni.pth",
    )
    out = tmp_path / "openuni"
    assert main(["convert", str(tmp_path / "openuni.pth"), str(out), "--recipe", str(recipe)]) == 0
    saved = load_file(out / "model.safetensors")
    assert {name.split(".")[0] for name in saved} == {"conditioner", "connector", "decoder"}
    assert load(str(out)).system.config()["backbone"]["weights"] == str(tiny_mllm)


def test_safetensors_alone(original: Engine, tmp_path: Path) -> None:
    weights = {name: tensor.detach() for name, tensor in openuni_tensors(original.system)}
    torch.save(weights, tmp_path / "openuni.pth")
    out = tmp_path / "openuni.safetensors"
    assert main(["convert", str(tmp_path / "openuni.pth"), str(out)]) == 0
    made = load_file(out)
    assert made.keys() == weights.keys()
    assert all(torch.equal(made[name], weights[name]) for name in weights)


class Evil:
    """Calls a function when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.slow
def test_mistakes_are_one_line(tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = tmp_path / "ran"
    torch.save({"a": Evil(ran)}, tmp_path / "evil.pth")
    torch.save({"a": torch.zeros(2), "b": "text"}, tmp_path / "text.pth")
    torch.save({"meta_queries": torch.zeros(2, 2)}, tmp_path / "less.pth")
    (tmp_path / "noise.pth").write_bytes(b"noise")
    (tmp_path / "there").mkdir()
    out = str(tmp_path / "out.safetensors")
    for words, said in (
        ([str(tmp_path / "evil.pth"), out], "evil.pth: not readable as weights (it asks for more than tensors"),
        ([str(tmp_path / "text.pth"), out], "text.pth: not readable as weights (b is no tensor)"),
        ([str(tmp_path / "noise.pth"), out], "noise.pth: not readable as weights"),
        ([str(tmp_path / "none.pth"), out], "none.pth: no such file"),
        ([str(tmp_path / "text.pth"), str(tmp_path / "there")], "there: exists already"),
        ([str(tmp_path / "text.pth"), str(tmp_path / "new")], "give --recipe for a folder"),
        ([str(tmp_path / "text.pth"), out, "--set", "seed=1"], "--set goes with --recipe"),
        (
            [str(tmp_path / "less.pth"), str(tmp_path / "new"), "--recipe", str(recipe)],
            "less.pth: conditioner.queries has",
        ),
    ):
        assert main(["convert", *words]) == 2
        told = capsys.readouterr().err
        assert said in told, told
        assert told.count("\n") == 1
        assert not Path(out).exists()
        assert not (tmp_path / "new").exists()
    assert not ran.exists()


def test_what_the_reader_takes_is_its_own_program() -> None:
    """It must import nothing of ours: an isolated interpreter runs it by its path."""
    from diptych.checkpoints import read_pickle

    text = Path(read_pickle.__file__).read_text()
    assert "import diptych" not in text
    assert "from diptych" not in text
    with pytest.raises(ValueError, match="no mapping"):
        read_pickle.tensors_of([1])
    with pytest.raises(UserError, match="no such file"):
        to_safetensors(Path("none.pth"), Path("none.safetensors"))
