"""The study command."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml

from diptych.cli.main import main
from diptych.recipes import study_run


def test_study(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plain = {
        "title": "Tiny",
        "tasks": {"toyeval": {"n": 1, "steps": 1}},
        "stages": {"mix": {"steps": 1}},
        "runs": {"only": {"recipe": "tiny.yaml"}},
    }
    Path("s.yaml").write_text(yaml.safe_dump(plain))
    with monkeypatch.context() as patched:
        patched.setattr(study_run, "train_recipe", lambda *args, **options: False)
        assert main(["study", "s.yaml", "--seeds", "2", "--limit", "6", "--set", "seeds=[0]"]) == 130
    command = capsys.readouterr().out.removeprefix("stopped and saved; continue with: diptych ")
    assert command == "study s.yaml --out runs/s --seeds 2 --limit 6 --set 'seeds=[0]'\n"
    assert main(shlex.split(command)) == 0
    said = capsys.readouterr().out
    assert "| only | " in said
    assert "runs/s: table.md, results.json, plot.png" in said
    assert list(json.loads(Path("runs/s/results.json").read_text())["runs"]["only"]["seeds"]) == ["2"]
    assert Path("runs/s/2/only/eval/toyeval.jsonl").is_file()


def test_study_lists_and_complains(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == 0
    assert "toy_iomm  Toy IOMM" in capsys.readouterr().out
    assert main(["study", "--limit", "3"]) == 2
    assert main(["study", "toy_iom"]) == 2
    assert "Did you mean 'toy_iomm'?" in capsys.readouterr().err
