from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from diptych.core.errors import UserError
from diptych.reports.curves import losses, plot, points, read, starts

ROWS = [
    {"step": 10, "stage": "read", "loss/cross_entropy.understand": 2.0, "lr": 0.1},
    {"step": 20, "stage": "read", "loss/cross_entropy.understand": 1.0, "lr": 0.1},
    {"step": 20, "stage": "read", "held_out/cross_entropy.understand": 1.5},
    {"step": 30, "stage": "draw", "loss/flow.image": 0.5, "held_out/flow.image": 0.6},
]


def run_folder(folder: Path, text: str = "\n".join(map(json.dumps, ROWS)) + "\n") -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_what_is_drawn() -> None:
    assert losses(ROWS) == ["cross_entropy.understand", "flow.image"]
    assert points(ROWS, "loss/cross_entropy.understand") == [(10, 2.0), (20, 1.0)]
    assert points(ROWS, "held_out/flow.image") == [(30, 0.6)]
    assert starts(ROWS) == {"read": 0, "draw": 20}


def test_a_panel_for_each_loss(tmp_path: Path) -> None:
    rows = read(run_folder(tmp_path / "run"))
    plot({"one": rows[:3]}, tmp_path / "new" / "one.png")
    plot({"one": rows, "two": rows}, tmp_path / "new" / "two.png")
    one, two = (Image.open(tmp_path / "new" / name).convert("L") for name in ("one.png", "two.png"))
    assert two.height == pytest.approx(2 * one.height, rel=0.01)
    assert len(set(two.tobytes())) > 10, "something is drawn"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["one.png", "two.png"]


@pytest.mark.parametrize(
    ("text", "said"), [(None, "no metrics.jsonl"), ("", "no losses yet"), ('{"step": 1, "sta', "no losses yet")]
)
def test_runs_without_losses(text: str | None, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    if text is not None:
        (folder / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=said):
        read(folder)


def test_a_file_that_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"curves\.xyz: not a picture.*png"):
        plot({"run": ROWS}, tmp_path / "curves.xyz")
    assert not list(tmp_path.iterdir())
