"""Studies: planned strictly, performed once, continued exactly, tabulated with their spread."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import warm
from diptych.cli.main import main
from diptych.core.draws import key
from diptych.core.errors import UserError
from diptych.core.locks import only_writer
from diptych.evaluation import evaluate
from diptych.recipes import clock, study, study_results, study_run
from diptych.recipes.sources import build_data
from diptych.recipes.study import Planned, StudySpec, asked, load, plan
from diptych.recipes.study_run import run_study
from diptych.reports import study as reports
from diptych.training import loop
from recipes.study_child import perform

PLAIN: dict[str, Any] = {
    "title": "Tiny",
    "tasks": {"toyeval": {"n": 1, "limit": 6, "steps": 2}},
    "stages": {"mix": {"steps": 2}},
    "set": ["run.save_every=1"],
    "runs": {
        "first": {"recipe": "tiny.yaml", "report": False},
        "second": {
            "recipe": "tiny.yaml",
            "set": ["stages.mix.batch_size=2"],
            "start": "first",
            "labels": {"ratio": 0.5, "tuning": "mix"},
        },
    },
}


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny_study(tiny_recipe: Path) -> StudySpec:
    Path("study.yaml").write_text(yaml.safe_dump(PLAIN))
    return load("study.yaml")


def weights(out: str, run: str = "0/second") -> dict[str, torch.Tensor]:
    return load_file(f"{out}/{run}/model/model.safetensors")


def test_plan_puts_seed_budget_and_start_into_each_recipe(tiny_study: StudySpec) -> None:
    first, second, *others = plan(tiny_study, (0, 3), Path("out"))
    assert [run.folder for run in others] == [Path("out/3/first"), Path("out/3/second")]
    assert [run.recipe.seed for run in (first, others[0])] == [0, 3]
    assert second.recipe.start == "out/0/first/model"
    assert others[1].recipe.start == "out/3/first/model"
    assert first.recipe.stages["mix"].steps == second.recipe.stages["mix"].steps == 2
    assert (first.chain, second.chain) == (((2, 4),), ((2, 4), (2, 2)))
    assert (first.samples, second.samples) == (8, 12)
    assert second.lineage == [first, second]
    assert first.recipe.run.save_every == 1
    assert not Path("out").exists()


@pytest.mark.slow
def test_a_stopped_study_goes_on_exactly(
    tiny_study: StudySpec, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = run_study(tiny_study, Path("whole"))
    assert whole is not None
    assert whole["complete"]

    calls: list[int] = []
    set_rate = loop.set_rate

    def set_rate_and_ask_to_stop(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 3:  # the second run's first step
            os.kill(os.getpid(), signal.SIGTERM)
        set_rate(*args)

    monkeypatch.setattr(loop, "set_rate", set_rate_and_ask_to_stop)
    assert run_study(tiny_study, Path("parts")) is None
    done = Path("parts/0/first/model/config.json").stat().st_mtime_ns
    assert not Path("parts/0/second/model").exists()
    said: list[str] = []
    found = run_study(tiny_study, Path("parts"), say=said.append)
    assert said == ["1 of 2 runs are finished already", "run 2 of 2: second, seed 0"]
    assert len(calls) == 4
    assert Path("parts/0/first/model/config.json").stat().st_mtime_ns == done
    assert found is not None
    assert found["runs"]["second"]["tasks"] == whole["runs"]["second"]["tasks"]
    for name, tensor in weights("whole").items():
        assert torch.equal(tensor, weights("parts")[name]), name

    evaluated = Path("parts/0/second/eval/results.json").stat().st_mtime_ns
    assert run_study(tiny_study, Path("parts"), say=said.append) == found
    assert json.loads(Path("parts/results.json").read_text()) == found
    assert len(calls) == 4
    assert Path("parts/0/second/eval/results.json").stat().st_mtime_ns == evaluated
    fewer = load("study.yaml", limit=2)
    assert run_study(fewer, Path("parts")) is not None
    assert len(calls) == 4
    assert json.loads(Path("parts/0/second/eval/results.json").read_text())["asked"]["toyeval"]["limit"] == 2
    assert not Path("parts/0/first/eval").exists()

    with Image.open("parts/plot.png") as picture:
        assert picture.width > 200
    text = Path("parts/table.md").read_text()
    assert "| ratio | tuning | toyeval |" in text
    assert "| 2 x 4 + 2 x 2 | 12      |" in text
    results = json.loads(Path("parts/results.json").read_text())
    assert results["runs"]["second"]["seeds"]["0"]["tasks"]["toyeval"]["figures"]["images"] == 2
    assert results["times"]["training_seconds"]["second"]["0"] > 0

    with pytest.raises(UserError, match=r"holds a run of another recipe \(stages.mix.steps: 2 there, 3 here\)"):
        run_study(load("study.yaml", ["stages.mix.steps=3"]), Path("parts"))
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("")
    with pytest.raises(UserError, match="something other than a study"):
        run_study(tiny_study, Path("mine"))


def test_table_has_every_seed_and_their_spread(tiny_study: StudySpec) -> None:
    runs = plan(tiny_study, (0, 1), Path("out"))
    for run, overall in ((runs[1], 0.25), (runs[3], 0.75)):
        scores = {"overall": overall, "interval": [overall - 0.25, overall], "counting": {"score": overall}}
        found = {"tasks": {"toyeval": scores}, "asked": asked(tiny_study), "hardware": "abacus", "versions": {"x": "1"}}
        found["seconds"] = 1.0
        (run.folder / "eval").mkdir(parents=True)
        (run.folder / "eval" / "results.json").write_text(json.dumps(found))
    found = study_results.judged(study_results.collect(tiny_study, runs))
    row = found["runs"]["second"]["tasks"]["toyeval"]
    assert (row["mean"], row["lowest"], row["highest"], row["interval"]) == (0.5, 0.25, 0.75, [0.25, 0.5])
    assert row["deviation"] == pytest.approx(0.3536, abs=1e-4)
    assert reports.table(found, "toyeval")[1] == [
        *("0.5", "mix", "0.500", "0.250-0.500", "0.250 0.750 (sd 0.354)", "2 x 4 + 2 x 2", "12")
    ]
    assert found["complete"]
    assert found["hardware"] == ["abacus"]
    other = study_results.judged(study_results.collect(load("study.yaml", limit=3), runs))
    assert not other["complete"]
    assert reports.table(other, "toyeval")[1][2] == "-"
    assert reports.category_table(other, "toyeval") == []
    found["runs"]["first"] = {**found["runs"]["second"], "tasks": {"toyeval": {"categories": {"single": 0.5}}}}
    header, *rows = reports.category_table(found, "toyeval")
    assert header[2:] == ["single", "counting"]
    assert [row[2:] for row in rows] == [["0.500", "-"], ["-", "0.500"]], "rows need not have the same categories"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("runs.second.start=frist", "runs.second.start: unknown earlier run 'frist'. Did you mean 'first'?"),
        ("runs.first.start=second", "unknown earlier run 'second'"),
        ("runs.first.sets=[]", "Did you mean 'set'?"),
        ("tasks={toyval: {}}", "Did you mean 'toyeval'?"),
        ("tasks={toyvqa: {cfg: 2}}", "toyvqa.cfg does nothing"),
        ("tasks.toyeval.n=0", "tasks.toyeval.n must be at least 1"),
        ("tasks={}", "at least one task"),
        ("runs={../x: {recipe: tiny.yaml}}", "becomes a folder"),
        ("stages={mx: {steps: 2}}", "unknown stage 'mx'. Did you mean 'mix'?"),
        ("stages.mix.step=2", "Did you mean 'steps'?"),
        ("runs.first.recipe=toy/gone", "unknown recipe 'toy/gone'"),
        ("runs.second.set=['stages.mix.train=[decodr]']", "Did you mean 'decoder'?"),
        ("seeds=[1, 1]", "each once"),
    ],
)
def test_mistakes_show_before_anything_is_written(tiny_study: StudySpec, change: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        run_study(load("study.yaml", [change]), Path("out"))
    assert message in str(error.value)
    assert not Path("out").exists()


Packaged = dict[str, tuple[StudySpec, dict[str, Planned]]]


@pytest.fixture(scope="module")
def packaged() -> Packaged:
    """The package's studies and their runs of one seed, by name; their systems are not built."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("build_system", "check_parts", "_check_starts"):
            patch.setattr(study, name, lambda *args, **options: None)
        studies = {name: load(name) for name in study.names()}
        return {
            name: (wanted, {run.name: run for run in plan(wanted, (0,), Path("out"))})
            for name, wanted in studies.items()
        }


@pytest.mark.slow
@pytest.mark.parametrize("name", study.names())
def test_studies_of_the_package_can_be_run(name: str) -> None:
    """Every system is built, every part that a stage trains is there, and every start fits."""
    wanted = load(name)
    assert len(plan(wanted, None, Path("out"))) >= 3 * len(wanted.runs)


def test_studies_of_the_package(packaged: Packaged) -> None:
    papers = {"toy_iomm", "toy_hieraquery", "toy_sgt", "toy_ovis_u1"}
    papers |= {f"{name}_thinking" for name in papers - {"toy_sgt"}}
    assert set(packaged) >= papers
    for name in ("toy_hieraquery_thinking", "toy_ovis_u1_thinking", "toy_sgt"):  # whose bench is told by five seeds
        wanted, _ = packaged[name]
        assert wanted.bench is not None
        assert len(wanted.runs[wanted.bench.row].seeds or ()) == 5
    claims = [claim for wanted, _ in packaged.values() for claim in wanted.claims.values()]
    assert len(claims) >= 15
    assert all(claim.text.endswith(".") and claim.source and claim.paper for claim in claims)
    assert len({claim.text for claim in claims}) == len(claims)
    for name, (wanted, rows) in packaged.items():
        for claim in wanted.claims.values():
            assert all(len(wanted.runs[row].seeds or wanted.seeds) >= 3 for row in claim.rows)
            if name != "toy_ovis_u1":  # whose claims are of its stages
                assert len({rows[row].samples for row in claim.rows if rows[row].spec.model is None}) == 1, claim


def test_rows_of_the_package_see_the_same_items(packaged: Packaged) -> None:
    """A source that rows of a claim share stands at one place of their stages, in batches of one size."""
    for name, (wanted, rows) in packaged.items():
        for claim in wanted.claims.values():
            places: dict[tuple[str, str], set[tuple[int, int]]] = {}
            for run in (rows[row] for row in claim.rows):
                for stage, spec in run.recipe.stages.items():
                    for place, source in enumerate(spec.data.sources):
                        places.setdefault((stage, source), set()).add((place, spec.batch_size))
            assert all(len(each) == 1 for each in places.values()), (name, claim.text)


def test_new_parts_beside_shipped_ones_have_other_seeds(packaged: Packaged) -> None:
    """With the seed of the shipped model, a new part of the same shapes begins as the one did that the model's others
    learned beside (a cosine of 0.38 with its trained weights), and rows of other shapes do not."""
    found: set[str] = set()
    for name, (wanted, rows) in packaged.items():
        for run in rows.values():
            decoder = run.plain["system"].get("decoder") or {}
            if run.spec.model is None and str(decoder.get("weights")).startswith("toy/"):
                found.add(name)
                assert 0 not in (run.spec.seeds or wanted.seeds), "of the library's recipes, and so of shipped models"
    assert found == {"toy_hieraquery_thinking", "toy_ovis_u1_thinking"}


def test_some_rows_alone(tiny_study: StudySpec) -> None:
    wanted = load("study.yaml", ["runs.third={recipe: tiny.yaml}"])
    said: list[str] = []
    found = run_study(wanted, Path("out"), rows=["second"], say=said.append)
    # With the run that it starts from; the third stays to do, and its row empty.
    assert said == ["run 1 of 2: first, seed 0", "run 2 of 2: second, seed 0"]
    assert found is not None
    assert not found["complete"]
    assert found["runs"]["second"]["tasks"]
    assert not Path("out/0/third").exists()
    # Rows that are performed later leave those that are there as they are.
    done = Path("out/0/second/eval/results.json").stat().st_mtime_ns
    later = run_study(wanted, Path("out"), rows=["third"])
    assert later is not None
    assert later["complete"]
    assert later["runs"]["second"] == found["runs"]["second"]
    assert Path("out/0/second/eval/results.json").stat().st_mtime_ns == done


def test_a_row_that_is_none(tiny_study: StudySpec, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["--plan"], []):
        assert main(["study", "study.yaml", "--rows", "secnd", "--no-estimate", *more]) == 2
        assert "--rows: unknown row 'secnd'. Did you mean 'second'?" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_start_that_does_not_fit_shows_before_the_first_run(tiny_study: StudySpec) -> None:
    wanted = load("study.yaml", ["runs.second.set=[system.conditioner.config.queries=5]"])
    with pytest.raises(UserError, match=r"runs\.second\.start: the weights of first do not fit into it \(.*queries"):
        plan(wanted, (0,), Path("out"))


def test_some_stages_of_a_recipe(tiny_study: StudySpec, tiny_plain: dict[str, Any]) -> None:
    [stage] = tiny_plain["stages"].values()
    tiny_plain["stages"] = {"one": stage, "mix": stage, "three": stage}
    Path("tiny.yaml").write_text("# Three stages.\n" + yaml.safe_dump(tiny_plain))
    _, second = plan(load("study.yaml", ["runs.second.stages=[mix]"]), (0,), Path("out"))
    assert list(second.recipe.stages) == ["mix"]
    assert second.chain == ((2, 4), (3, 4), (3, 4), (2, 2))
    with pytest.raises(UserError, match=r"runs\.second\.stages: unknown stage 'mx'\. Did you mean 'mix'\?"):
        plan(load("study.yaml", ["runs.second.stages=[mx]"]), (0,), Path("out"))


def order(run: Planned, stage: str) -> list[tuple[str, int]]:
    """(source, item) of every slot of a step of a stage's data."""
    spec = run.recipe.stages[stage].data
    mixture, _ = build_data(spec, key(run.recipe.seed, stage), 16, 8)
    names = list(spec.sources)
    return [(names[place], item) for place, item in mixture.draw(5).tried]


def test_rows_of_a_seed_see_the_same_items_in_the_same_order(tiny_study: StudySpec) -> None:
    """The draws are of seed, stage, and place of a source. So a source that a row does without has weight 0; taken
    away, the next would move to its place, and its items would come in another order."""
    weights = {"even": (0.5, 0.5), "more": (0.25, 0.75), "pairs": (0.0, 1.0)}
    sources = "stages.mix.data.sources"
    runs: dict[str, Any] = {
        name: {"recipe": "tiny.yaml", "set": [f"{sources}.pictures.weight={a}", f"{sources}.pairs.weight={b}"]}
        for name, (a, b) in weights.items()
    }
    removed = {"stages": {"mix": {"data": {"sources": {"pictures": None}}}}}
    Path("removed.yaml").write_text("# Pairs alone.\n" + yaml.safe_dump({"base": "tiny.yaml", **removed}))
    runs["without"] = {"recipe": "removed.yaml"}
    Path("order.yaml").write_text(yaml.safe_dump({**PLAIN, "runs": runs}))
    planned = {(run.name, run.seed): run for run in plan(load("order.yaml"), (0, 1), Path("out"))}
    drawn = {at: order(run, "mix") for at, run in planned.items()}
    assert {name for name, _ in drawn["even", 0]} == {"pictures", "pairs"}
    for row in ("even", "more"):
        both = [
            (mine, all_pairs)
            for mine, all_pairs in zip(drawn[row, 0], drawn["pairs", 0], strict=True)
            if mine[0] == "pairs"
        ]
        assert len(both) >= 4
        assert all(mine == all_pairs for mine, all_pairs in both)
    assert drawn["even", 0] != drawn["even", 1]
    assert [item for _, item in drawn["without", 0]] != [item for _, item in drawn["pairs", 0]]


def test_a_model_that_is_there_stands_for_a_run(tiny_study: StudySpec, tiny_model: Path) -> None:
    changes = ["runs.first.report=true", "stages.mix.steps=1", f"runs.first.model={tiny_model}"]
    wanted = load("study.yaml", changes)
    first, second = plan(wanted, (0,), Path("out"))
    assert (first.chain, second.chain) == ((), ((1, 2),))
    assert second.recipe.start == str(tiny_model)
    found = run_study(wanted, Path("out"))
    assert found is not None
    assert found["complete"]
    assert not Path("out/0/first/model").exists()
    table = Path("out/table.md").read_text()
    assert f"not counted: first ({tiny_model})" in table
    assert "given" in table
    with pytest.raises(UserError, match="holds scores of the model"):
        run_study(load("study.yaml", changes[:2]), Path("out"))
    with pytest.raises(UserError, match="no such folder, and no hub id"):
        plan(load("study.yaml", ["runs.first.model=./gone"]), (0,), Path("out"))


def test_a_model_that_is_given_is_sampled_as_the_study_says(tiny_study: StudySpec, tiny_model: Path) -> None:
    changes = ["runs.first.report=true", "stages.mix.steps=1", f"runs.first.model={tiny_model}"]
    own = run_study(load("study.yaml", changes), Path("own"))
    assert own is not None
    changes.append("set=[run.save_every=1, sampling.cfg=3.5, sampling.edit.cfg=2.5, sampling.solver=heun]")
    wanted = load("study.yaml", changes)
    first, second = plan(wanted, (0,), Path("out"))
    found = run_study(wanted, Path("out"))
    assert found is not None
    given, trained = (json.loads((run.folder / "eval/results.json").read_text())["sampling"] for run in (first, second))
    assert given == trained
    assert (given["cfg"], given["edit"], given["solver"]) == (3.5, {"cfg": 2.5}, "heun")
    assert found["sampled_differently"] == {}
    # Scores that it got with settings of its own are not taken for these.
    with pytest.raises(UserError, match=r"0/first: holds scores of the model .* with other sampling; choose another"):
        run_study(wanted, Path("own"))
    with pytest.raises(UserError, match=r"(?s)solvr.*solver"):
        run_study(load("study.yaml", [*changes[:-1], "set=[sampling.solvr=heun]"]), Path("typo"))


def test_a_table_says_which_rows_are_sampled_in_another_way(tiny_study: StudySpec, tiny_model: Path) -> None:
    changes = ["runs.first.report=true", "stages.mix.steps=1", f"runs.first.model={tiny_model}"]
    found = run_study(load("study.yaml", [*changes, "runs.first.set=[sampling.cfg=3.5]"]), Path("out"))
    assert found is not None
    assert list(found["sampled_differently"]) == ["cfg"]
    table = Path("out/table.md").read_text()
    assert "Not sampled alike: cfg is first 3.5, second " in table


def test_seconds_of_a_killed_session_count_up_to_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "progress.json").write_text("{}")
    os.utime(checkpoint / "progress.json", (1030.0, 1030.0))
    (tmp_path / clock.CLOCK).write_text('{"seconds": 5.0, "since": 1000.0}')
    assert clock.seconds(tmp_path) == 35.0
    with clock.clock(tmp_path):
        pass
    assert json.loads((tmp_path / clock.CLOCK).read_text())["since"] is None
    assert clock.seconds(tmp_path) == pytest.approx(35.0, abs=1.0)


def test_scoring_goes_on_task_by_task(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill between two tasks, and when the options of one change. Mutants: every task anew; one of the other
    options kept; a half-scored run taken for a scored one."""
    tasks = {"toyeval": {"n": 1, "limit": 4, "steps": 1}, "toyedit": {"limit": 2, "steps": 1}}
    plain = {**PLAIN, "tasks": tasks, "runs": {"first": {"recipe": "tiny.yaml"}}}
    Path("study.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    tiny_study, run_task, ran = load("study.yaml"), evaluate.run, list[str]()

    def stop_at_edits(engine: Any, task: str, **options: Any) -> Any:
        if task == "toyedit" and not ran:
            raise KeyboardInterrupt
        return run_task(engine, task, **options)

    def count(engine: Any, task: str, **options: Any) -> Any:
        ran.append(task)
        return run_task(engine, task, **options)

    monkeypatch.setattr(evaluate, "run", stop_at_edits)
    with pytest.raises(KeyboardInterrupt):
        run_study(tiny_study, Path("parts"))
    results = Path("parts/0/first/eval/results.json")
    assert list(json.loads(results.read_text())["tasks"]) == ["toyeval"]
    monkeypatch.setattr(evaluate, "run", count)
    found = run_study(tiny_study, Path("parts"))
    assert ran == ["toyedit"]
    whole = run_study(tiny_study, Path("whole"))
    assert ran == ["toyedit", "toyeval", "toyedit"]
    assert found is not None
    assert whole is not None
    assert {**found, "times": None} == {**whole, "times": None}
    both = [json.loads(Path(f"{out}/0/first/eval/results.json").read_text()) for out in ("parts", "whole")]
    for name in ("tasks", "asked", "failed", "sampling"):
        assert json.dumps(both[0][name]) == json.dumps(both[1][name]), name
    assert list(both[0]["seconds_of"]) == ["toyeval", "toyedit"]

    fewer = load("study.yaml", ["tasks.toyeval.limit=3"])
    changed = run_study(fewer, Path("parts"))
    assert ran[3:] == ["toyeval"]
    assert changed is not None
    images = {name: row["figures"]["images"] for name, row in changed["runs"]["first"]["seeds"]["0"]["tasks"].items()}
    assert images["toyeval"] == 3
    assert list(json.loads(results.read_text())["tasks"]) == ["toyeval", "toyedit"]


@pytest.mark.slow
def test_several_runs_at_once(tiny_study: StudySpec, tmp_path: Path) -> None:
    """The runs that succeed are forked; the one that fails is in a process of its own interpreter, as all are."""
    two = {"first": {"recipe": "tiny.yaml"}, "third": {"recipe": "tiny.yaml"}}
    Path("two.yaml").write_text(yaml.safe_dump({**PLAIN, "runs": two}))
    warm.group(perform, "two.yaml", "out", count=1, output=tmp_path / "said")
    assert Path("out/0/third.log").is_file()
    Path("broken.yaml").write_text(
        yaml.safe_dump({**PLAIN, "runs": {"first": {**two["first"], "set": ["start=gone"]}}})
    )
    with pytest.raises(UserError, match=r"first, seed 0: failed with exit code 2; see .*first.log"):
        run_study(load("broken.yaml"), Path("broken"), jobs=2)
    assert "gone" in Path("broken/0/first.log").read_text()


def test_a_run_that_still_saves_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, slept = tmp_path / "run", list[float]()
    others = threading.Event(), threading.Event()

    def hold() -> None:
        with only_writer(folder, "diptych study"):
            others[0].set()
            others[1].wait(60)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:  # the other one ends
            others[1].set()
            holder.join()

    holder = threading.Thread(target=hold)
    holder.start()
    others[0].wait(60)
    monkeypatch.setattr(study_run.time, "sleep", sleep)
    study_run.wait_for_writer(folder)
    assert slept == [1, 1]
    study_run.wait_for_writer(folder)
    assert slept == [1, 1]


@pytest.mark.slow
def test_a_killed_study_gives_the_same_files(tiny_study: StudySpec, tmp_path: Path) -> None:
    """Three seeds, killed twice by SIGKILL, in a training and while it was scored; all but the times is the same."""
    claim = {"text": "t", "source": "s", "paper": "p", "task": "toyeval", "threshold": 0.1, "row": "second"}
    plain = {**PLAIN, "seeds": [0, 1, 2], "claims": {"gain": {**claim, "over": ["first"]}}}
    plain["runs"] = {**PLAIN["runs"], "first": {"recipe": "tiny.yaml"}}
    Path("study.yaml").write_text(yaml.safe_dump(plain))
    words = ("study", "study.yaml", "--no-estimate", "--out")
    for there in ("parts/1/first/checkpoints/step-00000001", "parts/1/second/model/config.json"):
        process = warm.command(*words, "parts", output=tmp_path / "said")
        with warm.ended(process):
            until = time.monotonic() + 120
            while not Path(there).exists() and process.is_alive() and time.monotonic() < until:
                time.sleep(0.005)
            assert process.is_alive(), (tmp_path / "said").read_text()
            process.kill()
    assert not Path("parts/2/second/model").exists()
    for out in ("parts", "whole"):
        assert main([*words, out]) == 0
    figures = [json.loads(Path(out, "results.json").read_text()) for out in ("whole", "parts")]
    assert all(each.pop("times") for each in figures)
    assert json.dumps(figures[0]) == json.dumps(figures[1])
    tables = [Path(out, "table.md").read_text().split("## Times")[0] for out in ("whole", "parts")]
    assert tables[0] == tables[1]
    assert "cannot be told" in tables[0] or "does not hold" in tables[0]
