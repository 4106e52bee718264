"""`docs/extend.md`, followed literally in a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import diptych

PACKAGE = Path(diptych.__file__).parent
GUIDE = Path(__file__).parents[1] / "docs" / "extend.md"
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


IN_TURN = """
import json, sys
from diptych.cli.main import main
for words in json.loads(sys.argv[1]):
    assert main(words) == 0, words
"""


def changed(text: str, diff: str) -> str:
    """A file after one of the guide's changes: the lines without "+" must stand in it, one after the other, once."""
    lines = diff.rstrip("\n").split("\n")
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    assert text.count(f"{before}\n") == 1, f"this stands once in the file:\n{before}"
    return text.replace(f"{before}\n", f"{after}\n")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository's sources with the guide's files and lines."""

    def ignored(folder: str, names: list[str]) -> set[str]:
        """Weights of other models, and compiled files."""
        return {name for name in names if name == "__pycache__" or (Path(folder).name == "toy" and name != "mllm")}

    shutil.copytree(PACKAGE, tmp_path / "src" / "diptych", ignore=ignored)
    for language, place, text in BLOCK.findall(GUIDE.read_text(encoding="utf-8")):
        path = tmp_path / place
        if language in ("python", "yaml"):
            assert not path.exists(), f"{place} is a new file"
            path.write_text(text, encoding="utf-8")
        elif language == "diff":
            path.write_text(changed(path.read_text(encoding="utf-8"), text), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_the_guide_works_as_it_stands(copy: Path) -> None:
    """Each thing is a file and a line (a benchmark's line is its import and its name); the commands run on them."""
    blocks = BLOCK.findall(GUIDE.read_text(encoding="utf-8"))
    files = [place for language, place, _ in blocks if language == "python"]
    assert len(files) == 5
    added = [line for language, _, text in blocks if language == "diff" for line in text.split("\n") if line[:1] == "+"]
    assert len(added) == 6
    env = {**os.environ, "PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    (commands,) = [text for language, _, text in blocks if language == "sh"]
    words = [command.split() for command in commands.strip().split("\n")]
    assert {command[0] for command in words} == {"diptych"}
    arguments = json.dumps([command[1:] for command in words])
    ended = subprocess.run(
        [sys.executable, "-c", IN_TURN, arguments], cwd=copy, env=env, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    config = json.loads((copy / "runs" / "small" / "model" / "config.json").read_text(encoding="utf-8"))
    assert (config["decoder"]["kind"], config["conditioner"]["kind"]) == ("patch_mlp", "mean_token")
    results = json.loads((copy / "runs" / "scores" / "results.json").read_text(encoding="utf-8"))
    assert 0 <= results["tasks"]["stripes"]["overall"] <= 1


def test_a_change_that_does_not_fit_is_seen() -> None:
    with pytest.raises(AssertionError, match="this stands once"):
        changed("a = {\n}\n", " b = {\n+    1,\n")
    assert changed("a = {\n}\n", " a = {\n+    1,\n") == "a = {\n    1,\n}\n"
