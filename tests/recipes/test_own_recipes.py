"""Recipes of one's own: where their paths lead, what they have from a base, and slips in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from diptych.cli.main import main
from diptych.core.errors import UserError
from diptych.recipes.names import locate
from diptych.recipes.paths import beside
from diptych.recipes.plain import inherited, load_plain
from diptych.recipes.recipe import parse
from diptych.recipes.remarks import remarks


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_paths_are_those_beside_the_recipe(tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "photos").mkdir(parents=True)
    (project / "model").mkdir()
    sources = {
        "a": {"kind": "folder", "task": "image", "path": "photos", "captions": {"path": "c.csv", "key": "file"}},
        "b": {"kind": "jsonl", "task": "image", "path": "/data/rows.jsonl"},
        "c": {
            "kind": "webdataset",
            "task": "image",
            "path": "https://here/{0..3}.tar",
            "filters": {"scores": "s.json"},
        },
        "d": {"kind": "parquet", "task": "image", "path": "owner/name"},
        "e": {"kind": "parquet", "task": "image", "path": "../rows.parquet"},
    }
    tiny_plain["stages"]["mix"]["data"] |= {"sources": sources, "cache": "latents"}
    tiny_plain |= {"start": "model"}
    tiny_plain["system"]["decoder"]["weights"] = "Qwen/Qwen-Image"
    (project / "mine.yaml").write_text(yaml.safe_dump(tiny_plain))
    plain = load_plain("project/mine.yaml")
    data = plain["stages"]["mix"]["data"]
    paths = {name: source["path"] for name, source in data["sources"].items()}
    assert paths == {
        "a": str(project / "photos"),
        "b": "/data/rows.jsonl",
        "c": "https://here/{0..3}.tar",
        "d": "owner/name",
        "e": str(tmp_path / "rows.parquet"),
    }
    assert data["sources"]["a"]["captions"]["path"] == str(project / "c.csv")
    assert data["sources"]["c"]["filters"]["scores"] == str(project / "s.json")
    assert (data["cache"], plain["start"]) == (str(project / "latents"), str(project / "model"))
    assert plain["system"]["decoder"]["weights"] == "Qwen/Qwen-Image"
    (tmp_path / "over.yaml").write_text("base: project/mine.yaml\nseed: 3\n")
    assert load_plain("over.yaml")["stages"] == plain["stages"], "a base's paths are beside the base"
    assert beside({"stages": None, "system": [1], "start": 3}, tmp_path) == {"stages": None, "system": [1], "start": 3}


def test_what_remains_of_a_base(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "base: toy/iomm_finetune_mix\nstages:\n  finetune:\n    data: {sources: {pairs: {weight: 1.0}, mine: "
        "{kind: folder, task: image, path: x}}}\nsystem: {cfg_dropout: 0.2}\nsampling: {steps: 3}\n"
    )
    kept = inherited("mine.yaml")
    assert "stages.finetune.data.sources.images" in kept
    assert "system.prompts" in kept
    assert not {"stages.finetune", "stages.finetune.data.sources.pairs", "sampling", "system"} & set(kept)
    assert inherited("toy/iomm_finetune_mix") == []


def test_check_says_what_remains_of_a_base(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("base: tiny.yaml\nseed: 2\nstages: {mix: {schedule: {warmup: 2}}}\n")
    assert main(["check", "mine.yaml", "--preview"]) == 0
    said = capsys.readouterr().out
    assert "not said by mine.yaml: stages.mix.data.sources.pictures, stages.mix.data.sources.pairs, system" in said
    assert "note: stages.mix: the warm-up takes 2 of its 3 steps" in said
    assert said.endswith("no fault: the run can begin\n")


def test_check_lists_every_fault(tiny_plain: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos").mkdir()
    Image.new("RGB", (40, 48)).save("photos/good.png")
    for number in range(3):
        Path(f"photos/{number}.png").write_bytes(b"no picture")
    sources = tiny_plain["stages"]["mix"]["data"]["sources"]
    tiny_plain["stages"]["mix"]["data"]["max_bad_fraction"] = 0.0
    sources["photos"] = {"kind": "folder", "task": "image", "path": "photos"}
    sources["gone"] = {"kind": "folder", "task": "image", "path": "nowhere"}
    sources["rows"] = {"kind": "jsonl", "task": "image", "path": "rows.jsonl"}
    Path("r.yaml").write_text(yaml.safe_dump(tiny_plain))
    assert main(["check", "r.yaml", "--output", "sheets"]) == 2
    out, err = capsys.readouterr()
    faults = [line for line in out.splitlines() if line.startswith("fault: ")]
    assert [word in fault for word, fault in zip(("nowhere", "rows.jsonl", "3 of"), faults, strict=True)] == [True] * 3
    assert err.splitlines()[-1] == "diptych: error: 3 faults, listed above; a run would stop at the first"
    with Image.open("sheets/mix.png") as sheet:
        assert sheet.height > 100, "what can be read is drawn"


def test_a_warm_up_longer_than_its_stage(tiny_plain: dict[str, Any]) -> None:
    tiny_plain["stages"]["mix"]["schedule"] = {"kind": "cosine", "warmup": 100}
    (line,) = remarks(parse(tiny_plain))
    assert "stages.mix: the warm-up of 100 steps is not over after its 3" in line
    tiny_plain["stages"]["mix"]["schedule"]["warmup"] = 1
    assert remarks(parse(tiny_plain)) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.mxi.steps=3", r"--set stages.mxi.steps=3: unknown stage 'mxi'. Did you mean 'mix'"),
        ("stages.mix.data.sources.pair.weight=1", r"unknown source 'pair'. Did you mean 'pairs'"),
    ],
)
def test_a_typing_error_in_a_name(tiny_recipe: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_plain("tiny.yaml", [override])


def test_a_run_that_is_not_there_is_no_hub_id(tmp_path: Path, tiny_recipe: Path) -> None:
    with pytest.raises(UserError, match=r"runs/mine: no such folder. Models in runs: \(none\)"):
        locate("runs/mine")
    for place in ("runs/mine", "work/mine"):
        Path(place).mkdir(parents=True)
        (Path(place) / "recipe.yaml").write_text("")
    with pytest.raises(UserError, match=r"runs/min: no such folder. Did you mean 'runs/mine'"):
        locate("runs/min")
    with pytest.raises(UserError, match=r"work/min: no such folder. Did you mean 'work/mine'"):
        locate("work/min")


def test_repeats_of_the_only_source(tiny_plain: dict[str, Any]) -> None:
    sources = tiny_plain["stages"]["mix"]["data"]["sources"]
    name, source = next(iter(sources.items()))
    one = {**source, "repeats": 3}
    one.pop("weight", None)
    tiny_plain["stages"]["mix"]["data"]["sources"] = {name: one}
    (line,) = remarks(parse(tiny_plain))
    assert f"stages.mix.data.sources.{name}: repeats of 3 change nothing" in line
    tiny_plain["stages"]["mix"]["data"]["sources"] = {name: one, "more": one}
    assert remarks(parse(tiny_plain)) == []
