"""Benchmarks on a model, and on a stand-in that draws what it is asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.core.errors import UserError
from diptych.core.sample import Sample
from diptych.evaluation import toyedit, toyeval
from diptych.evaluation.evaluate import evaluate
from diptych.evaluation.results import shares
from diptych.inference.engine import Engine
from diptych.recipes.load import load
from diptych.toyworld.edits import Edit
from diptych.toyworld.render import render
from diptych.toyworld.scene import generator
from diptych.toyworld.toyeval import prompts, scene_for


class Renderer(Engine):
    """Draws every request with the renderer; `broken` images are not finite."""

    def __init__(self, engine: Engine, broken: int = 0) -> None:
        super().__init__(engine.system, engine.sampling)
        self.broken = broken

    def tensors(self, samples: Sequence[Sample], *, n: int, **options: Any) -> list[Tensor]:
        asked = {prompt.id: prompt for prompt in prompts()}
        made: list[Tensor] = []
        for sample in samples:
            for k in range(n):
                if sample.task == "edit":
                    scene = Edit.from_dict(sample.extra["edit"]).target
                else:
                    scene = scene_for(asked[sample.id], generator("drawn", sample.id, k))
                made.append(render(scene))
        for image in made[: self.broken]:
            image[0, 0, 0] = torch.nan
        return made


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return load(str(tiny_model))


def test_the_renderer_scores_one(engine: Engine) -> None:
    result = toyeval.run(Renderer(engine), n=2, limit=30)
    assert result.scores["overall"] >= 0.97
    assert (result.scores["images"], result.scores["prompts"], result.failed) == (60, 30, 0)
    edits = toyedit.run(Renderer(engine), limit=30)
    assert edits.scores["overall"] >= 0.95
    assert edits.scores["preserved"] >= 0.99


def test_images_that_are_not_finite_count_as_wrong(engine: Engine) -> None:
    result = toyeval.run(Renderer(engine, broken=6), n=1, limit=6)
    assert result.failed == 6
    assert result.scores["overall"] == 0


def test_results_on_disk(engine: Engine, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    tasks = ["toyeval", "toyedit", "toyvqa"]
    found = evaluate(engine, tasks, output=tmp_path / "out", n=1, limit=6, progress=lambda *x: told.append(x), steps=1)
    on_disk = json.loads((tmp_path / "out" / "results.json").read_text())
    assert on_disk == json.loads(json.dumps(found))
    toy = on_disk["tasks"]["toyeval"]
    assert toy["prompts"] == 6
    assert toy["counting"].keys() == {"score", "interval", "count"}
    assert toy["interval"][0] <= toy["overall"] <= toy["interval"][1]
    assert on_disk["sampling"]["steps"] == 1
    assert on_disk["dtype"] == "float32"
    assert {"toyeval", "toyedit", "toyvqa"} == {task for task, _, _ in told}
    assert ("toyeval", 6, 6) in told
    rows = [json.loads(line) for line in (tmp_path / "out" / "toyeval.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all((tmp_path / "out" / row["file"]).is_file() for row in rows)
    assert rows[0].keys() == {"id", "category", "prompt", "reason", "correct", "file"}
    assert (tmp_path / "out" / "toyeval.png").is_file()


def test_the_seed_decides(engine: Engine) -> None:
    drawn = [toyeval.run(engine, n=1, limit=1, seed=seed).samples[0].image for seed in (3, 3, 4)]
    first, again, other = (image.tobytes() for image in drawn if image is not None)
    assert first == again != other


def test_limit_takes_categories_in_turn() -> None:
    chosen = toyeval.choose(7)
    assert len(chosen) == 7
    assert len({prompt.category for prompt in chosen}) == 6
    assert len(toyeval.choose(None)) >= 120


def test_bad_requests(engine: Engine) -> None:
    with pytest.raises(UserError, match="Did you mean 'toyeval'"):
        evaluate(engine, ["toyevl"])
    with pytest.raises(UserError, match="limit"):
        evaluate(engine, ["toyeval"], limit=0)
    with pytest.raises(UserError, match="n is of toyeval and toyedit; toyvqa would leave it unused"):
        evaluate(engine, ["toyvqa"], n=2)


def test_n_is_for_the_tasks_that_make_several_pictures(engine: Engine) -> None:
    found = evaluate(engine, ["toyedit", "toyvqa", "toyfeatures"], n=2, limit=8, steps=1)["tasks"]
    assert (found["toyedit"]["images"], found["toyedit"]["edits"]) == (16, 8)
    assert found.keys() == {"toyedit", "toyvqa", "toyfeatures"}


def test_shares_and_their_intervals() -> None:
    found = shares({"a": [True] * 50 + [False] * 50, "b": [True] * 10})
    assert found["overall"] == 0.75
    assert 0.3 < found["a"]["interval"][0] < 0.5 < found["a"]["interval"][1] < 0.7
    assert found["b"] == {"score": 1.0, "interval": [1.0, 1.0], "count": 10}
