"""The study command."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from diptych.cli.main import main
from diptych.evaluation import evaluate
from diptych.recipes import study_estimate, study_run
from diptych.recipes.load import load


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
        assert main(["study", "s.yaml", "--seeds", "2", "--limit", "6", "--no-estimate", "--set", "seeds=[0]"]) == 130
    command = capsys.readouterr().out.removeprefix("stopped and saved; continue with: diptych ")
    assert command == "study s.yaml --out runs/s --seeds 2 --limit 6 --no-estimate --set 'seeds=[0]'\n"
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


def test_plan_says_what_would_be_run_and_for_how_long(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = {
        "title": "Tiny",
        "tasks": {"toyeval": {"n": 1, "steps": 1}, "toyvqa": {"limit": 500}},
        "stages": {"mix": {"steps": 1000}},
        "runs": {
            "first": {"recipe": "tiny.yaml", "report": False},
            "second": {"recipe": "tiny.yaml", "start": "first"},
        },
    }
    Path("s.yaml").write_text(yaml.safe_dump(plain))
    assert main(["study", "s.yaml", "--plan", "--no-estimate", "--seeds", "0", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Tiny: 4 runs, 0 claims",
        "first: tiny.yaml, 1,000 x 4; seeds 0 1; not scored",
        "second: tiny.yaml, 1,000 x 4 + 1,000 x 4; seeds 0 1; toyeval, toyvqa",
    ]
    timed: list[tuple[str, int]] = []
    monkeypatch.setattr(study_estimate, "measure", lambda recipe, system, name: 3600.0)
    monkeypatch.setattr(study_estimate, "_scoring", lambda engine, task, options: timed.append((task, 1)) or 900.0)
    assert main(["study", "s.yaml", "--plan", "--seeds", "0", "1", "--jobs", "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[3:5] == ["first: 1.00 h (training 1.00), 2 seeds", "second: 1.50 h (training 1.00), 2 seeds"]
    assert said[5].startswith("estimate: 5.0 h of one run at a time, 2.5 h with --jobs 2; from 2 timed steps of every")
    seconds = {("a", 0): study_estimate.Seconds(training=3600, scoring=0, quiet=0.25)}
    assert "had 25% of a processor's time; with all of it, 0.2 h" in study_estimate.lines([], seconds, 1)[-1]
    assert len(timed) == 2, "seeds of one recipe are timed once"
    assert not Path("runs").exists()


def test_an_estimate_counts_all_items(tiny_model: Path) -> None:
    engine = load(str(tiny_model))
    asked: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "run", lambda engine, task, **options: asked.append(options) or time.sleep(0.01))
        seconds = study_estimate._scoring(engine, "toyvqa", {"limit": 60})
    assert asked == [{"limit": 12}]
    assert seconds > 60 / 12 * 0.01
