"""Benchmarks on a model, and on a stand-in that draws what it is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diptych.core.errors import UserError
from diptych.core.locks import only_writer
from diptych.core.sample import Sample
from diptych.evaluation import fingerprint, toyeval
from diptych.evaluation.evaluate import evaluate, run
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
    result = run(Renderer(engine), "toyeval", n=2, limit=30)
    assert result.scores["overall"] >= 0.97
    assert (result.scores["images"], result.scores["prompts"], result.scores["failed"]) == (60, 30, 0)
    edits = run(Renderer(engine), "toyedit", limit=30)
    assert edits.scores["overall"] >= 0.95
    assert edits.scores["preserved"] >= 0.99


def test_images_that_are_not_finite_count_as_wrong(engine: Engine) -> None:
    result = run(Renderer(engine, broken=6), "toyeval", n=1, limit=6)
    assert result.scores["failed"] == 6
    assert result.scores["notes"][0] == "6 pictures are not finite and count as wrong"
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
    assert rows[0].keys() >= {"id", "category", "prompt", "reason", "score", "correct", "file"}
    assert (tmp_path / "out" / "toyeval.png").is_file()


def test_the_seed_decides(engine: Engine) -> None:
    drawn = [run(engine, "toyeval", n=1, limit=1, seed=seed).pictures.values() for seed in (3, 3, 4)]
    first, again, other = (image.tobytes() for (image,) in drawn if isinstance(image, Image.Image))
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


def test_stale_scores_are_not_given_again(tiny_model: Path, tmp_path: Path) -> None:
    """The same command after the weights changed, another seed, other steps: stopped and named, and nothing changed."""
    engine, out = load(str(tiny_model)), tmp_path / "out"
    first = evaluate(engine, ["toyeval", "toyvqa"], output=out, n=1, limit=6, steps=1)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for changes, words in (({"seed": 1}, "made with seed 0, now it is 1"), ({"steps": 2}, "made with sampling")):
        with pytest.raises(UserError, match=words):
            evaluate(engine, ["toyeval"], output=out, n=1, limit=6, **{"steps": 1, **changes})
    again = evaluate(engine, ["toyeval", "toyvqa"], output=out, n=1, limit=6, steps=1)
    assert again["tasks"] == first["tasks"]
    with torch.no_grad():
        next(engine.system.parameters()).add_(1e-3)
    for task in ("toyeval", "toyvqa"):
        with pytest.raises(UserError, match=r"made with weights '\w{16}', now it is '\w{16}'"):
            evaluate(engine, [task], output=out, limit=6, **({"n": 1, "steps": 1} if task == "toyeval" else {}))
    other = Engine(engine.system, engine.sampling, name="another")
    with pytest.raises(UserError, match=r"holds results of .*, not of another"):
        evaluate(other, ["toyedit"], output=out, limit=2, steps=1)
    same = {path: path.read_bytes() for path in files if path.name not in ("results.json", "results.md", "report.html")}
    assert all(files[path] == data for path, data in same.items())


def test_pictures_and_rows_that_were_changed_by_hand_are_seen(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, out = load(str(tiny_model)), tmp_path / "out"
    first = evaluate(engine, ["toyeval"], output=out, n=1, limit=2, steps=1)
    mine, other = sorted((out / "toyeval" / "images").glob("*.png"))
    mine.write_bytes(other.read_bytes())
    assert evaluate(engine, ["toyeval"], output=out, n=1, limit=2, steps=1)["tasks"] == first["tasks"]
    assert mine.read_bytes() != other.read_bytes()
    assert f"1 outputs are not those that were scored, the first is {mine.name}; they are made again" in caplog.text
    journal = out / "toyeval" / "scores.jsonl"
    for now, what in (('"score": "x"', "ValueError"), ('"scroe": 0.0', "KeyError: 'score'")):
        journal.write_text(re.sub(r'"sc\w+": [^,]+', now, journal.read_text()))
        with pytest.raises(UserError, match=f"toyeval: a row of scores.jsonl: {what}"):
            evaluate(engine, ["toyeval"], output=out, n=1, limit=2, steps=1)


def test_a_digest_sees_every_weight(engine: Engine) -> None:
    before = fingerprint.digest(engine.system)
    for parameter in (*engine.system.parameters(),)[::7]:
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
        assert fingerprint.digest(engine.system) != before
        with torch.no_grad():
            parameter.copy_(kept)
    assert fingerprint.digest(engine.system) == before


def test_toyvqa_s_hard_kind_stands_beside_the_score(engine: Engine) -> None:
    result = run(engine, "toyvqa", limit=16)
    hard = [row for row in result.rows if row["category"] == "color_of_two"]
    assert len(hard) == result.scores["color_of_two"]["count"] == 4
    assert result.scores["questions"] == 16
    kinds = {row["category"] for row in result.rows} - {"color_of_two"}
    assert result.scores["overall"] == pytest.approx(sum(result.scores[kind]["score"] for kind in kinds) / len(kinds))
    for row in hard:
        assert row["prompt"].startswith("what color is the ")


def test_toy_tasks_use_every_seed(engine: Engine, tmp_path: Path) -> None:
    found = evaluate(engine, ["toyedit", "toyvqa"], output=tmp_path, limit=4, seeds=[0, 1, 2], steps=1)["tasks"]
    alone = [evaluate(engine, ["toyedit"], limit=4, seed=seed, steps=1)["tasks"]["toyedit"] for seed in range(3)]
    assert found["toyedit"]["preserved"] == pytest.approx(sum(each["preserved"] for each in alone) / 3)
    assert set(found["toyedit"]["seeds"]) == {"0", "1", "2"}
    assert found["toyedit"]["images"] == 12
    assert len(list((tmp_path / "toyedit").glob("seed-*/images/*.png"))) == 12
    assert "seeds" not in found["toyvqa"], "answers are greedy, and asked for once"
    with pytest.raises(UserError, match="toyvqa is answered greedily"):
        evaluate(engine, ["toyvqa"], seeds=[0, 1])


def test_stopped_and_gone_on_with(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was drawn and scored before a stop is not drawn again, and the whole is as in one go."""
    whole = evaluate(engine, ["toyedit"], output=tmp_path / "whole", limit=20, steps=1, batch_size=16)["tasks"][
        "toyedit"
    ]
    drawn: list[int] = []
    inner = engine.tensors

    def stopping(samples: Sequence[Sample], **options: Any) -> list[Tensor]:
        drawn.append(len(samples))
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return inner(samples, **options)

    monkeypatch.setattr(engine, "tensors", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(engine, ["toyedit"], output=tmp_path / "parts", limit=20, steps=1, batch_size=16)
    assert (
        evaluate(engine, ["toyedit"], output=tmp_path / "parts", limit=20, steps=1, batch_size=16)["tasks"]["toyedit"]
        == whole
    )
    assert drawn == [16, 4, 4]


def test_a_limit_marks_toy_tasks_and_the_report_has_their_pictures(engine: Engine, tmp_path: Path) -> None:
    found = evaluate(engine, ["toyeval"], output=tmp_path, n=1, limit=6, steps=1)["tasks"]["toyeval"]
    assert found["notes"] == ["--limit 6: not comparable with full runs"]
    assert not found["comparable"]
    assert found["interval"][1] - found["interval"][0] > 0.1
    assert (tmp_path / "report.html").read_text().count("data:image/png") == 6


def test_one_writer_per_folder(engine: Engine, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as other, only_writer(tmp_path, "diptych eval"):
        refused = other.submit(evaluate, engine, ["toyvqa"], output=tmp_path, limit=1)
        with pytest.raises(UserError, match="is writing there"):
            refused.result()
    evaluate(engine, ["toyvqa"], output=tmp_path, limit=1)
