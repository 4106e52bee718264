"""The benchmarks that need a GPU, dry on a CPU at small size."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    spec = importlib.util.spec_from_file_location("gpu_steps", BENCHMARKS / "gpu" / "steps.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_steps_on_a_gpu_run_dry(
    steps: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--device cpu --card 8GB --peak 0.1 --scale 16 --layers 1 --size 64 --batch 3 --steps 2 --workers 0"
    monkeypatch.setattr(sys, "argv", ["steps.py", *small.split()])
    monkeypatch.setattr(steps, "PRESETS", steps.PRESETS[-1:])
    steps.main()
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    for name in ("iomm", "bagel"):
        found = results[name]
        assert found["seconds"] > 0
        assert found["mfu"] == pytest.approx(3 * found["tflop_a_sample"] / found["seconds"] / 0.1)
        assert found["predicted_gib"] > 0
    (preset,) = results["presets"]
    assert preset["preset"] == "own number format, nf4, offload layers"
    assert preset["predicted_gib"] > 0
