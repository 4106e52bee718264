"""Claims: stated strictly, judged by one rule, and judged again from the committed file alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from diptych.cli.main import main
from diptych.core.errors import UserError
from diptych.evaluation import bootstrap
from diptych.recipes import study as study_module
from diptych.recipes import study_results
from diptych.recipes.study import Planned, StudySpec, asked, load, plan
from diptych.recipes.study_claims import FAILS, HOLDS, UNKNOWN

SHARES = {"base": 0.4, "better": 0.6, "same": 0.42, "worse": 0.2, "zero": 0.0, "nil": 0.02}
CATEGORIES = ("single", "counting")
CLAIM = {"text": "It helps.", "source": "table 1", "paper": "0.9 against 0.8", "task": "toyeval", "threshold": 0.05}
ABOVE, WITHIN = "the interval lies above 0.05", "the interval holds 0.05"
CLAIMS: dict[str, tuple[dict[str, Any], str, str]] = {
    "gain": ({"row": "better", "over": ["base", "worse"]}, HOLDS, ABOVE),
    "one_of_two": ({"row": "better", "over": ["better2", "worse"]}, FAILS, "a difference of 0.05 is excluded"),
    "reversed": ({"row": "worse", "over": ["better"]}, FAILS, "reversed"),
    "small": ({"row": "same", "over": ["base"]}, UNKNOWN, WITHIN),
    "no_worse": ({"row": "same", "over": ["base"], "threshold": -0.3}, HOLDS, "the interval lies above -0.3"),
    "lower": ({"row": "worse", "over": ["better"], "direction": "lower"}, HOLDS, ABOVE),
    "rise": ({"trend": ["worse", "base", "better"]}, HOLDS, ABOVE),
    "no_rise": ({"trend": ["better", "base", "worse"]}, FAILS, "reversed"),
    "beyond": ({"row": "better", "over": ["base"], "beyond": ["same", "worse"]}, UNKNOWN, WITHIN),
    "one_category": ({"row": "better", "over": ["worse"], "category": "counting"}, HOLDS, ABOVE),
    "floor": ({"row": "nil", "over": ["zero"], "threshold": 0.2}, UNKNOWN, "all rows lie at the floor of the task"),
    "scalar": ({"row": "better", "over": ["base"], "scalar": "preserved"}, HOLDS, ABOVE),
    "no_scalar": ({"row": "better", "over": ["base"], "scalar": "gone"}, UNKNOWN, "toyeval has no figure 'gone'"),
    "lonely": ({"row": "alone", "over": ["base"]}, UNKNOWN, "one seed says nothing of others"),
    "not_run": ({"row": "waiting", "over": ["base"]}, "", "not run yet"),
}


def scored(folder: Path, share: float, seed: int, wanted: dict[str, Any], curve: bool) -> None:
    """What an evaluation leaves: right items by chance, more of them where they are easy, the same in all rows."""
    rng = np.random.default_rng(seed)
    hard = np.random.default_rng(7).uniform(0, 1, 96)
    right = (0.5 * hard + 0.5 * rng.uniform(0, 1, 96) < share).astype(int) if share else np.zeros(96, int)
    rows = [{"id": str(n // 2), "category": CATEGORIES[n // 48], "score": int(x)} for n, x in enumerate(right)]
    means = [float(part.mean()) for part in np.split(right, 2)]
    tasks: dict[str, Any] = {
        "toyeval": {
            "overall": float(np.mean(means)),
            "interval": [0.0, 1.0],
            **{
                name: {"score": mean, "interval": [0, 1], "count": 48}
                for name, mean in zip(CATEGORIES, means, strict=True)
            },
            "preserved": 0.5 + share / 2,
            "images": 96,
        }
    }
    results = {"tasks": tasks, "asked": wanted, "hardware": "abacus", "versions": {"x": "1"}, "seconds": 7.0 + seed}
    (folder / "eval" / "toyeval").mkdir(parents=True)
    (folder / "eval" / "results.json").write_text(json.dumps(results))
    (folder / "eval" / "toyeval" / "units.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "seconds.json").write_text(json.dumps({"seconds": 60.0 + seed, "since": None}))
    for step in (100, 200) if curve else ():
        (folder / "scores" / f"step-{step:08d}").mkdir(parents=True)
        part = {"tasks": {"toyeval": {"overall": means[0] * step / 200}}}
        (folder / "scores" / f"step-{step:08d}" / "results.json").write_text(json.dumps(part))


@pytest.fixture
def plain_study(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tiny_recipe.parent)
    monkeypatch.setattr(bootstrap, "REPLICATES", 1_000)
    monkeypatch.setattr(study_module, "build_system", lambda *args, **options: None)
    monkeypatch.setattr(study_module, "check_parts", lambda *args: None)
    names = [*SHARES, "better2", "alone", "waiting"]
    return {
        "title": "Claims",
        "seeds": [0, 1, 2],
        "tasks": {"toyeval": {"n": 2, "limit": 48}},
        "runs": {name: {"recipe": "tiny.yaml"} for name in names},
        "claims": {name: {**CLAIM, **more} for name, (more, _, _) in CLAIMS.items()},
        "bench": {"row": "base", "task": "toyeval", "low": 0.2, "spread": 0.2},
    }


@pytest.fixture
def scored_study(plain_study: dict[str, Any]) -> tuple[StudySpec, list[Planned]]:
    """A study whose runs are scored, without a training."""
    Path("claims.yaml").write_text(yaml.safe_dump(plain_study))
    study = load("claims.yaml")
    runs = plan(study, None, Path("out"))
    for run in runs:
        if run.name == "waiting" or (run.name == "alone" and run.seed):
            continue
        drawn = 100 * run.seed + [*SHARES, "alone"].index(run.name.removesuffix("2"))
        share = SHARES.get(run.name.removesuffix("2"), 0.6)
        scored(run.folder, share, drawn, asked(study, run.spec), curve=run.name in ("base", "better"))
    return study, runs


@pytest.fixture
def results(scored_study: tuple[StudySpec, list[Planned]]) -> dict[str, Any]:
    return study_results.write(*scored_study, Path("out"))


def test_each_claim_has_its_verdict(results: dict[str, Any]) -> None:
    found = {name: (claim["verdict"] or "", claim["why"]) for name, claim in results["claims"].items()}
    assert found == {name: (verdict, why) for name, (_, verdict, why) in CLAIMS.items()}
    gain = results["claims"]["gain"]
    assert [each["against"] for each in gain["estimates"]] == ["base", "worse"]
    assert gain["seeds"] == [0, 1, 2]
    better, base, worse = (results["runs"][name] for name in ("better", "base", "worse"))
    each = [[row["seeds"][seed]["tasks"]["toyeval"]["overall"] for seed in "012"] for row in (better, base)]
    by_hand = [first - second for first, second in zip(*each, strict=True)]
    assert gain["estimates"][0]["each_seed"] == pytest.approx(by_hand, abs=1e-6)
    assert gain["estimates"][0]["value"] == pytest.approx(np.mean(by_hand), abs=1e-6)
    rise = better["tasks"]["toyeval"]["mean"] - worse["tasks"]["toyeval"]["mean"]
    assert results["claims"]["rise"]["estimates"][0]["value"] == pytest.approx(rise, abs=1e-6)
    assert results["claims"]["lower"]["estimates"][0]["low"] > 0
    # The bench says whether it can tell.
    bench = results["bench"]
    assert bench["passes"]
    assert bench["gap"] == pytest.approx(max(bench["seeds"].values()) - min(bench["seeds"].values()), abs=1e-6)
    text = Path("out/table.md").read_text()
    assert "Found over 3 seeds" in text
    assert "It passes." in text
    # Scores against steps.
    row = results["runs"]["better"]["seeds"]["1"]
    assert [step for step, _ in row["scores"]["toyeval"]] == [100, 200]
    mean = np.mean([score for _, score in row["scores"]["toyeval"]])
    assert row["tasks"]["toyeval"]["figures"]["mean_over_steps"] == pytest.approx(mean, abs=1e-6)
    assert results["runs"]["same"]["seeds"]["1"]["scores"] == {}
    # Times stand apart.
    assert results["times"]["training_seconds"]["base"] == {"0": 60.0, "1": 160.0, "2": 260.0}
    text = Path("out/table.md").read_text()
    assert "Together 1.6 hours of one run at a time." in text.split("## Times")[1]
    assert "seconds" not in json.dumps({**results, "times": {}})


def test_tables_and_plots_come_from_the_committed_file_alone(
    results: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out/results.json").rename("kept.json")
    written = Path("out/table.md").read_text()
    assert "| It helps." in written
    assert "not run yet" in written
    shutil.rmtree("out")
    assert Path("kept.json").stat().st_size < 60_000
    assert main(["study", "--from", "kept.json", "--out", "again"]) == 0
    said = capsys.readouterr().out
    assert "gain: +0." in said
    assert "again: table.md, plot.png, steps.png" in said
    assert Path("again/table.md").read_text() == written
    assert Path("again/steps.png").stat().st_size > 5_000
    assert not Path("again/results.json").exists()
    # What the file says of several runs is not believed, it is computed anew.
    spoiled = json.loads(Path("kept.json").read_text())
    spoiled["claims"]["reversed"]["verdict"] = HOLDS
    spoiled["runs"]["base"]["tasks"] = {}
    Path("spoiled.json").write_text(json.dumps(spoiled))
    rebuilt, _ = study_results.rebuild(Path("spoiled.json"), Path("third"))
    assert rebuilt == json.loads(Path("kept.json").read_text())


def test_items_that_do_not_give_the_score_are_refused(scored_study: tuple[StudySpec, list[Planned]]) -> None:
    path = Path("out/0/base/eval/toyeval/units.jsonl")
    path.write_text(path.read_text().replace('"score": 1', '"score": 0'))
    with pytest.raises(UserError, match=r"base, seed 0: toyeval: its items give 0.0000, its results say 0.2917"):
        study_results.collect(*scored_study)


def test_what_is_no_study_is_not_rebuilt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("{}", '{"format": 1, "runs": {}}', '{"format": 2, "runs": {"a": {}}}'):
        (tmp_path / "r.json").write_text(content)
        assert main(["study", "--from", str(tmp_path / "r.json"), "--out", str(tmp_path / "o")]) == 2
        assert "r.json: not the results.json of a study" in capsys.readouterr().err
    assert main(["study", "toy_iomm", "--from", "r.json", "--out", "o"]) == 2
    assert main(["study", "--from", "r.json"]) == 2
    assert "--from needs --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("claims.gain.row=bettr", "claims.gain: unknown row 'bettr'. Did you mean 'better'?"),
        ("claims.gain.over=[]", "claims.gain.over: name the rows that better is compared with"),
        ("claims.gain.trend=[base, same, worse]", "claims.gain: give either `row` with `over`, or `trend`"),
        ("claims.rise.trend=[base, same]", "claims.rise.trend: needs at least three rows"),
        ("claims.gain.beyond=[base, same]", "claims.gain.beyond: goes with one row in `over`"),
        ("claims.gain.task=toyvqa", "unknown task 'toyvqa'"),
        ("claims.gain.category=countin", "unknown category 'countin'. Did you mean 'counting'?"),
        ("claims.gain.threshold=null", "claims.gain.threshold"),
        ("claims.one_category.scalar=preserved", "give either a category or a scalar"),
        ("claims.gain.direction=up", "unknown value 'up'"),
        ("bench.row=bas", "bench: unknown row 'bas'"),
        ("bench.task=toyedit", "bench: unknown task 'toyedit'"),
        ("runs.base.tasks=[toyvqa]", "runs.base.tasks: unknown task 'toyvqa'"),
        ("runs.base.tasks=[]", "runs.base.tasks: names none"),
        ("runs.base.seeds=[1, 1]", "runs.base.seeds [1, 1]: give at least one, and each once"),
    ],
)
def test_mistakes_in_claims(plain_study: dict[str, Any], change: str, message: str) -> None:
    Path("claims.yaml").write_text(yaml.safe_dump(plain_study))
    with pytest.raises(UserError) as error:
        load("claims.yaml", [change])
    assert message in str(error.value)


def test_rows_may_have_seeds_and_tasks_of_their_own(plain_study: dict[str, Any]) -> None:
    plain_study["tasks"]["toyvqa"] = {"limit": 8}
    plain_study["runs"]["base"] |= {"seeds": [0, 1, 2, 3, 4], "tasks": ["toyeval"]}
    plain_study["runs"]["better"] |= {"start": "base"}
    Path("claims.yaml").write_text(yaml.safe_dump(plain_study))
    study = load("claims.yaml")
    runs = plan(study, None, Path("out"))
    assert [run.seed for run in runs if run.name == "base"] == [0, 1, 2, 3, 4]
    assert [run.seed for run in runs if run.name == "better"] == [0, 1, 2]
    assert list(asked(study, study.runs["base"])) == ["toyeval"]
    assert list(asked(study, study.runs["same"])) == ["toyeval", "toyvqa"]
    assert {run.seed for run in plan(study, (7,), Path("out"))} == {7}
    with pytest.raises(UserError, match=r"runs.better.seeds: run base, from which it starts, has no seed 0"):
        plan(load("claims.yaml", ["runs.base.seeds=[1, 2, 3]"]), None, Path("out"))
