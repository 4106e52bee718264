"""Pictures in the official layouts, out and in again; several seeds; several processes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import warm
from diptych.core.errors import UserError
from diptych.evaluation.download import Data
from diptych.evaluation.evaluate import evaluate
from diptych.evaluation.judge_endpoint import Endpoint, EndpointJudge
from diptych.evaluation.task import Tools
from diptych.inference.engine import Engine
from diptych.recipes.load import load
from evaluation.clip_child import score

Write = Callable[[str, dict[str, str]], Path]
Server = Any
HEAD = "item_id,text,proposition_id,dependency,tuple,question_natural_language"
DPG = [
    "a,about a,1,0,entity - whole (a),Is there a dog?",
    "a,about a,2,1,attribute - color (a),Is the dog red?",
    "b,about b,1,0,entity - whole (b),Is there a cat?",
]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return load(str(tiny_model))


def wise(*numbers: int) -> str:
    return json.dumps([{"prompt_id": n, "Prompt": f"prompt {n}", "Explanation": "x"} for n in numbers])


@pytest.fixture
def data(bench_data: Write) -> Path:
    """A few items of every benchmark of generation and editing but FID's."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    prompts = [
        {"tag": "single_object", "include": [{"class": "clock", "count": 1}], "prompt": "a photo of a clock"},
        {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}], "prompt": "a photo of a red cow"},
    ]
    bench_data("geneval", {"evaluation_metadata.jsonl": "".join(json.dumps(each) + "\n" for each in prompts)})
    bench_data("dpg", {"dpg_bench.csv": "\n".join([HEAD, *DPG]) + "\n"})
    names = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
    for task, ending in (("wise_legacy", ""), ("wise_verified", "_verified")):
        files = {f"{name}{ending}.json": wise(n) for name, n in zip(names, (1, 401, 901), strict=True)}
        bench_data(task, files)
    bench_data("clipscore", {"8k_coco.txt": "a photo of a clock\na red cow\n"})
    edits = {"17": {"id": "p/0.png", "prompt": "make it red", "edit_type": "style"}}
    folder = bench_data(
        "imgedit", {"basic_edit.json": json.dumps(edits), "prompts.json": '{"style": "<edit_prompt>?"}'}
    )
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "blue").save(buffer, "PNG")
    (folder / "imgedit" / "singleturn" / "p").mkdir(parents=True)
    (folder / "imgedit" / "singleturn" / "p" / "0.png").write_bytes(buffer.getvalue())
    columns = {
        "task_type": ["color_alter"],
        "key": ["k0"],
        "instruction": ["turn red"],
        "instruction_language": ["en"],
        "Intersection_exist": [True],
        "input_image": [{"bytes": buffer.getvalue(), "path": None}],
    }
    (folder / "gedit").mkdir()
    parquet.write_table(arrow.table(columns), folder / "gedit" / "part.parquet")
    return folder


def script(text: str, times: int) -> dict[str, Any]:
    if "make it red" in text:
        return {"text": "A: 4\nB: 3\nC: 2"}
    if "turn red" in text or '"score"' in text:
        return {"text": '{"score": [8, 4], "reasoning": "x"}'}
    if "prompt " in text:
        return {"text": "Consistency: 2\nRealism: 1\nAesthetic Quality: 1\nScore: 1"}
    return {"text": "no" if "red" in text else "yes"}


def tools_of(data: Path, tiny_eyes: tuple[str, str], url: str) -> Tools:
    judge = EndpointJudge(Endpoint(url=url, model="m", retries=0, workers=2))
    return Tools(
        data=Data(folder=data, online=False), detector=tiny_eyes[0], clip=tiny_eyes[1], self_test=False, judge=judge
    )


LAYOUTS = {
    "geneval": [f"{p:05d}/samples/{k:04d}.png" for p in range(2) for k in range(4)],
    "dpg": ["a.png", "b.png"],
    "wise_legacy": ["1.png", "401.png", "901.png"],
    "wise_verified": ["1.png", "401.png", "901.png"],
    "imgedit": ["17.png"],
    "gedit": ["fullset/color_alter/en/k0.png"],
    "clipscore": ["00000.png", "00001.png"],
}


@pytest.mark.slow
def test_what_is_made_is_scored_the_same_from_anywhere(
    engine: Engine, data: Path, tiny_eyes: tuple[str, str], judge_server: Server, tmp_path: Path
) -> None:
    judge_server.script = script
    tools, made = tools_of(data, tiny_eyes, judge_server.url), tmp_path / "made"
    ours = evaluate(engine, list(LAYOUTS), output=made, tools=tools)["tasks"]
    for task, files in LAYOUTS.items():
        folder = made / task / "images"
        assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png")) == sorted(files), task
        assert ours[task]["comparable"], (task, ours[task]["failures"])
        for path in folder.rglob("*.*"):  # as someone else's pictures: in a folder of each task, some as JPEG and WebP
            target = tmp_path / "theirs" / task / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".png" and task != "clipscore" and task != "geneval":
                Image.open(path).save(target.with_suffix(".webp"), lossless=True)
            else:
                target.write_bytes(path.read_bytes())
    theirs = evaluate(None, list(LAYOUTS), output=tmp_path / "o", images=tmp_path / "theirs", tools=tools)["tasks"]
    for task in LAYOUTS:
        assert theirs[task]["overall"] == pytest.approx(ours[task]["overall"], rel=1e-6), task
        alone = evaluate(None, [task], output=tmp_path / "a", images=tmp_path / "theirs" / task, tools=tools)["tasks"]
        assert alone[task]["overall"] == theirs[task]["overall"], task
    assert ours["dpg"]["overall"] == pytest.approx(75)
    assert ours["wise_legacy"]["overall"] == pytest.approx(0.85)
    assert ours["wise_verified"]["overall"] == 1
    assert ours["imgedit"]["overall"] == 3
    assert ours["gedit"]["color_alter"]["score"] == 4
    with pytest.raises(UserError, match="--images are scored as they are"):
        evaluate(None, ["dpg"], output=tmp_path / "a", images=tmp_path / "theirs" / "dpg", tools=tools, seeds=[0, 1])


def test_figures_beside_the_score_are_means_over_seeds(
    engine: Engine, data: Path, tiny_eyes: tuple[str, str], judge_server: Server, tmp_path: Path
) -> None:
    dogs: list[str] = []

    def moody(text: str, times: int) -> dict[str, Any]:
        if "Is there a dog" not in text:
            return {"text": "yes"}
        dogs.append(text)
        return {"text": "yes" if len(dogs) <= 4 else "no"}  # the first seed's four cells, and not the second's

    judge_server.script = moody
    judge = EndpointJudge(Endpoint(url=judge_server.url, model="m", retries=0, workers=1))
    tools = Tools(data=Data(folder=data, online=False), judge=judge)
    found = evaluate(engine, ["dpg"], output=tmp_path / "o", tools=tools, seeds=[3, 4])["tasks"]["dpg"]
    assert found["seeds"] == {"3": pytest.approx(100), "4": pytest.approx(50)}
    assert found["overall"] == pytest.approx(75)
    assert found["seed_std"] == pytest.approx(50 / 2**0.5)
    assert found["l1"] == {"attribute": pytest.approx(100), "entity": pytest.approx(75)}
    assert {path.parts[-3] for path in (tmp_path / "o" / "dpg").rglob("a.png")} == {"seed-3", "seed-4"}
    first, second = ((tmp_path / "o" / "dpg" / f"seed-{s}" / "images" / "a.png").read_bytes() for s in (3, 4))
    assert first != second


@pytest.mark.slow
def test_two_processes_make_and_score_what_one_does(
    tiny_model: Path, data: Path, tiny_eyes: tuple[str, str], tmp_path: Path
) -> None:
    results: list[dict[str, Any]] = []
    for count in (2, 1):
        out = tmp_path / str(count)
        warm.group(score, str(tiny_model), data, tiny_eyes[1], out, count=count, output=tmp_path / f"said{count}")
        results.append(json.loads((out / "results.json").read_text())["tasks"]["clipscore"])
    two, one = results
    assert (two["images"], two["missing"]) == (2, 0)
    assert two["overall"] == pytest.approx(one["overall"], rel=1e-6)
    for name in ("00000.png", "00001.png"):
        folders = [tmp_path / count / "clipscore" / "images" for count in "12"]
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert len((tmp_path / "2" / "clipscore" / "scores.1.jsonl").read_text().splitlines()) == 2
