"""diptych analyze: files for one model and for two, and mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from diptych.cli.main import main


def test_words_of_two_models(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned, out = tmp_path / "tuned", tmp_path / "out"
    shutil.copytree(tiny_model, tuned)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a {red|color} {circle|object}\n\na <b> cross left of a square\n")
    words = ["analyze", "words", str(tiny_model), str(tuned), "--prompts", str(prompts), "--steps", "1"]
    assert main([*words, "--output", str(out)]) == 0
    found = json.loads((out / "words.json").read_text())["models"]
    assert list(found) == [str(tiny_model), str(tuned)]
    assert found[str(tuned)]["prompts"] == 2
    assert "| change" in (out / "words.md").read_text()
    assert "+0.0000" in capsys.readouterr().out
    page = (out / "words.html").read_text()
    assert page.count("<tr>") == 3
    assert "(+0.00)" in page
    with Image.open(out / "words.png") as plot:
        assert plot.width > 1000


def test_looking_and_features(tiny_model: Path, tmp_path: Path) -> None:
    out = str(tmp_path)
    assert main(["analyze", "looking", str(tiny_model), "--limit", "2", "--output", out]) == 0
    assert main(["analyze", "features", str(tiny_model), "--limit", "40", "--output", out]) == 0
    for name in ("looking.json", "looking.md", "looking.png", "features.json", "features.md", "features.png"):
        assert (tmp_path / name).stat().st_size > 0
    [probe] = json.loads((tmp_path / "features.json").read_text())["models"].values()
    assert len(probe["plane"]) == len(probe["labels"]) == 40


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["word", "x"], "unknown look 'word'. Did you mean 'words'"),
        (["words", "x", "--images", "y"], "words: does not read --images"),
        (["looking", "x", "x"], "give one model, or two different ones"),
        (["looking", "x", "--limit", "0"], "--limit must be at least 1"),
        (["words", "toy/mllm"], "makes no images from text"),
    ],
)
def test_mistakes(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", *words, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
