"""Scores over a grid of guidance scales: every point once, a table, a plot, and going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diptych.cli.main import main
from diptych.core.errors import UserError
from diptych.evaluation import sweep as sweeping
from diptych.evaluation.evaluate import evaluate
from diptych.evaluation.sweep import Axis, axis, sweep
from diptych.recipes.load import load


def test_a_grid_is_scored_once_and_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[dict[str, Any]] = []

    def counted(*given: Any, **options: Any) -> dict[str, Any]:
        calls.append({name: options[name] for name in ("cfg", "image_cfg")})
        return evaluate(*given, **options)

    monkeypatch.setattr(sweeping, "evaluate", counted)
    command = ["sweep", str(tiny_model), "--tasks", "toyedit", "--limit", "2", "--output", str(tmp_path / "out")]
    command += ["--device", "cpu", "--over", "cfg=1,3"]
    assert main([*command, "--over", "image_cfg=1,1.5"]) == 0
    assert calls == [{"cfg": a, "image_cfg": b} for a in (1, 3) for b in (1, 1.5)]
    out = capsys.readouterr().out
    assert "| cfg | image_cfg |" in out
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [point["at"] for point in found["points"]] == calls
    assert all("preserved" in point["tasks"]["toyedit"] for point in found["points"])
    single = evaluate(load(str(tiny_model)), ["toyedit"], limit=2, cfg=3.0, image_cfg=1.5)["tasks"]["toyedit"]
    assert found["points"][3]["tasks"]["toyedit"] == single
    rows = [line for line in (tmp_path / "out" / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 4
    assert (tmp_path / "out" / "plot.png").is_file()
    calls.clear()
    assert main([*command, "--over", "image_cfg=1,1.5,2"]) == 0
    assert calls == [{"cfg": 1, "image_cfg": 2}, {"cfg": 3, "image_cfg": 2}]
    assert main(["sweep", str(tiny_model), *command[2:], "--over", "image_cfg=1", "--seed", "5"]) == 2
    assert "holds another sweep (seeds: [0] there, [5] here)" in capsys.readouterr().err


def test_axes_and_their_mistakes(tiny_model: Path, tmp_path: Path) -> None:
    assert axis("cfg=1, 2.5") == Axis("cfg", (1.0, 2.5))
    assert axis("steps=4,8") == Axis("steps", (4, 8))
    for text, words in (
        ("cfg", "FIELD=VALUE"),
        ("cgf=1", "unknown field 'cgf'"),
        ("cfg=1,x", "'x' is no number"),
        ("steps=1.5", "'1.5' is no value of steps"),
        ("cfg=1,1", "twice"),
    ):
        with pytest.raises(UserError, match=words):
            axis(text)
    engine = load(str(tiny_model))
    cases: list[tuple[list[Axis], dict[str, Any], str]] = [
        ([], {}, "no axis"),
        ([axis("cfg=1")] * 2, {}, "given twice"),
        ([axis("cfg=1")], {"cfg": 2.0}, "given twice"),
        ([axis("cfg=-1")], {}, "must not be negative"),
    ]
    for axes, options, words in cases:
        with pytest.raises(UserError, match=words):
            sweep(engine, ["toyedit"], axes, output=tmp_path / "never", **options)
