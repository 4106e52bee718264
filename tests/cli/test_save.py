"""Models saved in our layout and in the one that their family is published in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diptych.cli.main import main
from diptych.recipes.build import build_system
from diptych.recipes.load import load_system, start
from diptych.recipes.recipe import parse
from diptych.recipes.run import save_model


def test_an_mllm_comes_back_to_the_bit(tiny_mllm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["save", str(tiny_mllm), str(tmp_path / "out"), "--layout", "published"]) == 0
    assert "MB" in capsys.readouterr().out
    one, two = (load_file(folder / "model.safetensors") for folder in (tiny_mllm, tmp_path / "out"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_our_layout_keeps_weights_and_number_format(tiny_model: Path, tmp_path: Path) -> None:
    assert main(["save", str(tiny_model), str(tmp_path / "out")]) == 0
    one, two = (load_file(folder / "model.safetensors") for folder in (tiny_model, tmp_path / "out"))
    assert one.keys() == two.keys()
    assert all(one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one)
    assert main(["save", str(tiny_model), str(tmp_path / "half"), "--dtype", "float16"]) == 0
    assert {x.dtype for x in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}


def test_an_openuni_becomes_the_file_that_a_recipe_starts_from(tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    plain = tiny_plain
    plain["system"] |= {
        "condition": "queries",
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
    torch.manual_seed(5)
    system = build_system(parse(plain).system)
    system.mark_trained(system.named_parts())
    save_model(system, parse(plain), tmp_path / "ours")
    assert main(["save", str(tmp_path / "ours"), str(tmp_path / "out"), "--layout", "published"]) == 0
    file = tmp_path / "out" / "model.safetensors"
    assert {"meta_queries", "projector.weight", "lmm.vision_model.embeddings.class_embedding"} <= set(load_file(file))
    back = start(parse(yaml.safe_load(json.dumps({**plain, "start": str(file)}))))
    one, two = load_system(str(tmp_path / "ours"))[0].state_dict(), back.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_mistakes_are_one_line(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    for words, told in (
        (["--layout", "publshed"], "unknown layout 'publshed'. Did you mean 'published'?"),
        (["--layout", "published"], "has no published layout"),
    ):
        assert main(["save", str(tiny_model), out, *words]) == 2
        assert told in capsys.readouterr().err
        assert not Path(out).exists()
    assert main(["save", str(tiny_model), str(tiny_model)]) == 2
    assert "exists already" in capsys.readouterr().err
