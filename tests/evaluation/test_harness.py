"""Published benchmarks from prompts to results, with tiny models, a local judge, and things that go wrong."""

from __future__ import annotations

import csv
import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import warm
from diptych.core.errors import UserError
from diptych.evaluation import download
from diptych.evaluation.compare import compare, paired
from diptych.evaluation.download import Data
from diptych.evaluation.evaluate import evaluate
from diptych.evaluation.geneval_models import Detector, known_pictures
from diptych.evaluation.judge import CachedJudge, JudgeDown
from diptych.evaluation.judge_endpoint import Endpoint, EndpointJudge
from diptych.evaluation.task import Rewritten, Tools
from diptych.inference.engine import Engine
from diptych.recipes.load import load
from evaluation.wise_child import score

Write = Callable[[str, dict[str, str]], Path]
Server = Any
PROMPTS = [
    {"tag": "single_object", "include": [{"class": "clock", "count": 1}], "prompt": "a photo of a clock"},
    {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}], "prompt": "a photo of a red cow"},
    {
        "tag": "colors",
        "include": [{"class": "bench", "count": 1, "color": "blue"}],
        "prompt": "a photo of a blue bench",
    },
]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return load(str(tiny_model))


@pytest.fixture
def geneval_data(bench_data: Write) -> Path:
    return bench_data("geneval", {"evaluation_metadata.jsonl": "".join(json.dumps(each) + "\n" for each in PROMPTS)})


def eyes(data: Path, tiny_eyes: tuple[str, str], **options: Any) -> Tools:
    detector, clip = tiny_eyes
    given = {"self_test": False, "batch_size": 4, **options}
    return Tools(data=Data(folder=data, online=False), detector=detector, clip=clip, **given)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.mark.slow
def test_geneval_from_prompts_to_results(
    engine: Engine, geneval_data: Path, tiny_eyes: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools, out = eyes(geneval_data, tiny_eyes), tmp_path / "out"
    assert evaluate(engine, ["geneval"], output=out, tools=tools, only="generate")["tasks"] == {}
    images = out / "geneval" / "images"
    made = snapshot(images)
    assert set(made) == {f"{p:05d}/samples/{k:04d}.png" for p in range(3) for k in range(4)}
    assert json.loads((images / "00001" / "metadata.jsonl").read_text()) == PROMPTS[1]
    assert len(set(made.values())) == 12

    for name in ("00001/samples/0000.png", "00001/samples/0003.png"):
        (images / name).unlink()
    found = evaluate(engine, ["geneval"], output=out, tools=tools, log_samples=True)
    assert snapshot(images) == made, "a resumed run draws what it would have drawn"
    task = found["tasks"]["geneval"]
    assert task["images"] == 12
    assert task["overall"] == pytest.approx((task["single_object"]["score"] + task["colors"]["score"]) / 2)
    assert task["interval"][0] <= task["overall"] <= task["interval"][1]
    assert (task["incomplete"], task["comparable"], task["missing"], task["failed"]) == (False, True, 0, 0)
    assert task["about"]["detector"].startswith("hf-m2f")
    assert task["correct_prompts"] >= task["correct_images"]
    on_disk = json.loads((out / "results.json").read_text())
    assert on_disk["tasks"]["geneval"]["overall"] == task["overall"]
    assert {"commit", "versions", "seed", "dtype", "device", "sampling", "date"} <= set(on_disk)
    samples = [json.loads(line) for line in (out / "samples_geneval.jsonl").read_text().splitlines()]
    assert len(samples) == 12
    assert {"prompt", "score", "digest", "detail"} <= set(samples[0])
    assert "| colors " in (out / "results.md").read_text()
    assert "IOMM-B 512" in (out / "results.md").read_text()
    assert (out / "report.html").read_text().count("data:image/png") >= 6

    looked: list[int] = []
    real = Detector.detect
    monkeypatch.setattr(Detector, "detect", lambda self, p, t=0.3: looked.append(len(p)) or real(self, p, t))
    assert evaluate(engine, ["geneval"], output=out, tools=tools)["tasks"]["geneval"]["overall"] == task["overall"]
    assert looked == [], "what is scored is not looked at again"
    Image.new("RGB", (32, 32), "red").save(images / "00000" / "samples" / "0000.png")
    evaluate(None, ["geneval"], output=out, tools=tools, only="score")
    assert looked == [1], "a picture that changed is"

    two = evaluate(engine, ["geneval"], output=tmp_path / "two", tools=tools, seeds=[0, 1], limit=2)
    scores = two["tasks"]["geneval"]
    assert set(scores["seeds"]) == {"0", "1"}
    assert scores["overall"] == pytest.approx(np.mean(list(scores["seeds"].values())))
    assert not scores["comparable"]
    assert "--limit 2" in scores["notes"][0]
    (result,) = compare(out, tmp_path / "two")
    assert result.items == 2
    assert any("--limit 2" in warning for warning in result.warnings)


@pytest.mark.slow
def test_rewritten_prompts_are_read_and_named(
    engine: Engine, geneval_data: Path, tiny_eyes: tuple[str, str], tmp_path: Path
) -> None:
    other = Rewritten(name="rewritten.txt", texts=("one clock", "one red cow", "one blue bench"))
    raw = evaluate(engine, ["geneval"], output=tmp_path / "raw", tools=eyes(geneval_data, tiny_eyes))
    tools = eyes(geneval_data, tiny_eyes, rewritten=other)
    found = evaluate(engine, ["geneval"], output=tmp_path / "other", tools=tools)["tasks"]["geneval"]
    assert snapshot(tmp_path / "raw") != snapshot(tmp_path / "other")
    assert found["notes"] == ["the model read the prompts of rewritten.txt: not comparable with the published ones"]
    assert (found["comparable"], raw["tasks"]["geneval"]["comparable"]) == (False, True)
    assert found["about"]["prompts"].startswith("rewritten, rewritten.txt (")
    with pytest.raises(UserError, match="made with rewritten"):
        evaluate(engine, ["geneval"], output=tmp_path / "raw", tools=tools)


def test_batches_of_any_size_see_the_same(tiny_eyes: tuple[str, str]) -> None:
    detector = Detector(tiny_eyes[0], short=64, long=106)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (48, 64, 3), dtype=np.uint8) for _ in range(3)]
    together = detector.detect(pictures, 0.02)
    alone = [detector.detect([each], 0.02)[0] for each in pictures]
    assert any(together)
    for many, one in zip(together, alone, strict=True):
        assert [(each.label, each.box) for each in many] == [(each.label, each.box) for each in one]
        assert [each.score for each in many] == pytest.approx([each.score for each in one], rel=1e-4)
        assert [each.score for each in many] == sorted((each.score for each in many), reverse=True)


def test_pictures_made_elsewhere_and_what_is_wrong_with_them(
    geneval_data: Path, tiny_eyes: tuple[str, str], tmp_path: Path
) -> None:
    tools, folder = eyes(geneval_data, tiny_eyes), tmp_path / "pictures"
    for prompt in range(3):
        for k in range(4):
            path = folder / f"{prompt:05d}" / "samples" / f"{k:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30 + prompt), (60 * k, 80, 0)).save(path)
    (folder / "00002" / "samples" / "0001.jpg").unlink()
    (folder / "00002" / "samples" / "0002.jpg").write_bytes(b"not a picture")
    found = evaluate(None, ["geneval"], output=tmp_path / "out", images=folder, tools=tools)["tasks"]["geneval"]
    assert (found["images"], found["missing"], found["failed"], found["incomplete"]) == (11, 1, 1, True)
    assert found["missing_files"] == ["00002/samples/0001.png"]
    assert found["failures"][0]["failure"].startswith("not a readable picture")
    assert found["notes"][0] == "1 of 12 pictures are missing"
    with pytest.raises(UserError, match=r"no such folder\. Did you mean .*pictures"):
        evaluate(None, ["geneval"], output=tmp_path / "out", images=tmp_path / "picture", tools=tools)
    with pytest.raises(UserError, match=r"none of the 12 pictures .*expected 00000/samples/0000.png.*found samples"):
        evaluate(None, ["geneval"], output=tmp_path / "o2", images=folder / "00000", tools=tools)
    with pytest.raises(UserError, match="fails its self-test"):
        evaluate(
            None,
            ["geneval"],
            output=tmp_path / "o3",
            images=folder,
            tools=eyes(geneval_data, tiny_eyes, self_test=True),
        )
    with pytest.raises(UserError, match=r"made with self_test False, now it is True"):
        evaluate(
            None,
            ["geneval"],
            output=tmp_path / "out",
            images=folder,
            tools=eyes(geneval_data, tiny_eyes, self_test=True),
        )


def test_known_pictures_show_what_they_say() -> None:
    drawn = known_pictures()
    assert [name for name, _, _ in drawn] == ["stop sign", "clock", "traffic light"]
    for _, image, box in drawn:
        left, top, right, bottom = map(int, box)
        assert image[top:bottom, left:right].std() > 2 * image[:60].std()


def test_checksums_and_missing_data(geneval_data: Path, tiny_eyes: tuple[str, str], tmp_path: Path) -> None:
    tools = eyes(geneval_data, tiny_eyes)
    path = geneval_data / "geneval" / "evaluation_metadata.jsonl"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match="not the published file: SHA-256"):
        evaluate(None, ["geneval"], output=tmp_path / "o", images=tmp_path, tools=tools)
    path.unlink()
    with pytest.raises(UserError, match=r"is missing; it is published at https://nowhere\.invalid"):
        evaluate(None, ["geneval"], output=tmp_path / "o", images=tmp_path, tools=tools)


def test_a_file_without_a_published_checksum_warns_on_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "mjhq_fid" / "meta_data.json"
    path.parent.mkdir()
    path.write_text("one")
    data = Data(folder=tmp_path, online=False)
    data.file("mjhq_fid", "meta_data.json")
    data.file("mjhq_fid", "meta_data.json")
    assert not caplog.records
    path.write_text("another")
    data.file("mjhq_fid", "meta_data.json")
    assert "changed: its SHA-256 was" in caplog.text


def test_the_published_sources_are_whole() -> None:
    for task, files in download.FILES.items():
        for file in files:
            assert file.url.startswith("https://"), task
            assert file.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", file.sha256), task


WISE_FILES = {
    "cultural_common_sense.json": [1, 2, 3],
    "spatio-temporal_reasoning.json": [401, 568],
    "natural_science.json": [701, 801, 901],
}


@pytest.fixture
def wise_data(bench_data: Write) -> Path:
    entries = {
        name: json.dumps([{"prompt_id": n, "Prompt": f"prompt {n}", "Explanation": f"meaning {n}"} for n in numbers])
        for name, numbers in WISE_FILES.items()
    }
    return bench_data("wise_legacy", entries)


@pytest.fixture
def wise_pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "wise"
    folder.mkdir()
    for number in (n for numbers in WISE_FILES.values() for n in numbers):
        Image.new("RGB", (8, 8), (number % 256, 5, 9)).save(folder / f"{number}.png")
    return folder


def replay(text: str, times: int) -> dict[str, Any]:
    """One kind of reply for each prompt."""
    number = int(re.search(r"prompt (\d+)", text)[1])  # type: ignore[index]
    good = "Consistency: 2\nRealism: 1\nAesthetic Quality: 1"
    return {
        1: {"text": good},
        2: {"text": "**Consistency**: 1\n**Realism**: 2\n**Aesthetic Quality**: 0"},
        3: {"text": "Consistency: 1/2\nRealism: 2.0\nAesthetic Quality: 1"},
        401: {"text": "I'm sorry, I can't look at this."},
        568: {"text": "Consistency: 2\nReal", "finish": "length"},
        701: {"text": good, "wait": 0.8},
        801: {"status": 429} if times == 1 else {"text": good},
        901: {"text": "Consistency: 9\nRealism: 1\nAesthetic Quality: 1"},
    }[number]


def asking(data: Path, url: str, out: Path, **options: Any) -> Tools:
    endpoint = Endpoint(url=url, model="m", timeout=0.4, retries=1, wait=0.001, **options)
    judge = CachedJudge(EndpointJudge(endpoint), out / "judge.jsonl")
    return Tools(data=Data(folder=data, online=False), judge=judge)


def test_wise_with_every_kind_of_reply(
    judge_server: Server, wise_data: Path, wise_pictures: Path, tmp_path: Path
) -> None:
    judge_server.script, out = replay, tmp_path / "out"
    tools = asking(wise_data, judge_server.url, out, workers=4)
    found = evaluate(None, ["wise_legacy"], output=out, images=wise_pictures, tools=tools)["tasks"]["wise_legacy"]
    assert found["CULTURE"]["score"] == pytest.approx(np.mean([0.85, 0.55, 0.6]))
    assert found["PHYSICS"]["score"] == pytest.approx(0.85)
    assert (found["failed"], found["incomplete"], found["official_overall"]) == (4, True, None)
    failures = {each["image"]: each["failure"] for each in found["failures"]}
    assert failures["401.png"].startswith("no scores in the reply \"I'm sorry")
    assert failures["568.png"] == "cut off after 1024 tokens"
    assert failures["701.png"] == "no answer in 0.4 s"
    assert failures["901.png"].startswith("a score out of range {'consistency': 9.0")
    assert found["overall"] == pytest.approx((0.4 * found["CULTURE"]["score"] + 0.1 * 0.85) / 0.5)
    before = sum(judge_server.asked.values())
    judge_server.script = lambda text, times: {"text": "Consistency: 1\nRealism: 1\nAesthetic Quality: 1"}
    again = evaluate(
        None, ["wise_legacy"], output=out, images=wise_pictures, tools=asking(wise_data, judge_server.url, out)
    )["tasks"]["wise_legacy"]
    assert sum(judge_server.asked.values()) == before + 1, "only the reply that never came is asked for"
    assert again["BIOLOGY"]["score"] == pytest.approx(0.5)
    assert again["failed"] == 3


def test_a_judge_that_is_down_stops_and_goes_on(
    judge_server: Server, wise_data: Path, wise_pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    judge_server.script = lambda text, times: {"text": "Consistency: 1\nRealism: 1\nAesthetic Quality: 1"}
    tools = asking(wise_data, judge_server.url, out, workers=1, budget=3)
    with pytest.raises(
        JudgeDown, match=r"budget of 3 judge requests is spent; 3 of 8 pictures of wise_legacy are judged"
    ):
        evaluate(None, ["wise_legacy"], output=out, images=wise_pictures, tools=tools)
    assert not (out / "results.json").exists()
    tools = asking(wise_data, judge_server.url, out, workers=1)
    found = evaluate(None, ["wise_legacy"], output=out, images=wise_pictures, tools=tools)["tasks"]["wise_legacy"]
    assert found["overall"] == pytest.approx(0.5)
    assert set(judge_server.asked.values()) == {1}
    with pytest.raises(UserError, match="needs a judge"):
        evaluate(None, ["wise_legacy"], output=tmp_path / "o", images=wise_pictures, tools=Tools(data=tools.data))


@pytest.mark.slow
def test_killed_and_resumed_loses_and_repeats_nothing(
    judge_server: Server, wise_data: Path, wise_pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    good = {"text": "Consistency: 2\nRealism: 2\nAesthetic Quality: 2"}
    judge_server.script = lambda text, times: good if len(judge_server.asked) <= 5 else {**good, "wait": 30}
    process = warm.start(score, wise_data, wise_pictures, out, judge_server.url, output=tmp_path / "said")
    limit = time.monotonic() + 300
    while len(judge_server.asked) < 6 and process.is_alive() and time.monotonic() < limit:
        time.sleep(0.01)
    process.kill()
    process.join()
    first = dict(judge_server.asked)
    assert len(first) == 6
    judge_server.script = lambda text, times: good
    tools = asking(wise_data, judge_server.url, out, workers=1)
    settings = tools.judge.about()  # type: ignore[union-attr]
    assert settings["max_tokens"] == 1024
    found = evaluate(None, ["wise_legacy"], output=out, images=wise_pictures, tools=tools)["tasks"]["wise_legacy"]
    assert (found["overall"], found["images"], found["failed"]) == (pytest.approx(1.0), 8, 0)
    repeated = [times for times in judge_server.asked.values() if times > 1]
    assert repeated == [2], "only the question that was under way when the process was killed"


def dpg_csv(items: dict[str, list[tuple[str, str]]]) -> str:
    buffer = io.StringIO()
    names = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed"]
    writer = csv.writer(buffer)
    writer.writerow([*names, "tuple", "question_natural_language"])
    for item, questions in items.items():
        for number, (parents, text) in enumerate(questions, start=1):
            writer.writerow(
                [item, f"about {item}", "", number, parents, "entity", "whole", f"entity - whole ({number})", text]
            )
    return buffer.getvalue()


def test_dpg_generates_grids_and_asks_about_their_cells(
    engine: Engine, judge_server: Server, bench_data: Write, tmp_path: Path
) -> None:
    questions = {"a": [("0", "Is there a dog?"), ("1", "Is the dog red?")], "b": [("0", "Is there a cat?")]}
    data, out = bench_data("dpg", {"dpg_bench.csv": dpg_csv(questions)}), tmp_path / "out"
    judge_server.script = lambda text, times: {"text": "No." if "there a dog" in text else "**Yes**, it is."}
    found = evaluate(engine, ["dpg"], output=out, tools=asking(data, judge_server.url, out))["tasks"]["dpg"]
    with Image.open(out / "dpg" / "images" / "a.png") as sheet:
        assert sheet.size == (64, 64)
    assert (found["overall"], found["all"]["score"]) == (50.0, 50.0)
    assert found["l1"]["entity"] == pytest.approx(200 / 3)
    assert found["about"]["convention"] == "DPG-Bench, fixed"
    judge_server.script = lambda text, times: {"text": "perhaps"}
    unsure = evaluate(engine, ["dpg"], output=tmp_path / "b", tools=asking(data, judge_server.url, tmp_path / "b"))
    assert unsure["tasks"]["dpg"]["overall"] is None
    assert "neither yes nor no: 'perhaps'" in unsure["tasks"]["dpg"]["failures"][0]["failure"]


def test_imgedit_and_gedit(engine: Engine, judge_server: Server, bench_data: Write, tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    edits = {
        str(n): {"id": f"p/{n}.png", "prompt": f"make it {n}", "edit_type": kind}
        for n, kind in enumerate(("add", "style", "style"))
    }
    prompts = {"add": "Added? <edit_prompt>", "style": "Styled? <edit_prompt>"}
    data, out = (
        bench_data("imgedit", {"basic_edit.json": json.dumps(edits), "prompts.json": json.dumps(prompts)}),
        tmp_path / "out",
    )
    for n in range(3):
        path = data / "imgedit" / "singleturn" / "p" / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (0, 60 * n, 0)).save(path)
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "blue").save(buffer, "PNG")
    kinds = ["color_alter", "style_change", "color_alter", "color_alter"]
    columns = {
        "task_type": kinds,
        "key": ["k0", "k1", "k2", "k3"],
        "instruction": ["turn red", "as a sketch", "turn blue", "变红"],
        "instruction_language": ["en", "en", "en", "cn"],
        "Intersection_exist": [True, True, False, True],
        "input_image": [{"bytes": buffer.getvalue(), "path": None}] * 4,
    }
    (data / "gedit").mkdir()
    parquet.write_table(arrow.table(columns), data / "gedit" / "part.parquet")

    def script(text: str, times: int) -> dict[str, Any]:
        if text.startswith(("Added", "Styled")):
            return {"text": f"Brief reasoning: fine.\nA: {3 if 'Added' in text else 5}\nB: 4\nC: 5"}
        if "turn blue" in text:
            return {"text": "cannot say"}
        return {"text": '{"score": [9, 4], "reasoning": "x"}' if "Instruction" in text else '{"score": [9, 9]}'}

    judge_server.script = script
    tools = asking(data, judge_server.url, out)
    found = evaluate(engine, ["imgedit", "gedit"], output=out, tools=tools)["tasks"]
    imgedit, gedit = found["imgedit"], found["gedit"]
    assert imgedit["add"]["score"] == 4
    assert imgedit["overall"] == pytest.approx((4 + 14 / 3) / 2)
    assert imgedit["overall_per_item"] == pytest.approx((4 + 28 / 3) / 3)
    assert imgedit["official_per_item"] == pytest.approx(4.45)
    assert gedit["overall"] == pytest.approx(6.0)
    assert (gedit["failed"], gedit["images"], gedit["full_O"]) == (1, 3, None)
    assert (out / "gedit" / "images" / "fullset" / "style_change" / "en" / "k1.png").is_file()
    assert "consistency: no score" in gedit["failures"][0]["failure"]


def test_clipscore_and_refusals(bench_data: Write, tiny_eyes: tuple[str, str], tmp_path: Path) -> None:
    data = bench_data("clipscore", {"8k_coco.txt": "a photo of a clock\na red cow\n\ntwo clock\n"})
    for number in range(3):
        path = tmp_path / "p" / f"{number:05d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (30, 20), (90 * number, 0, 50)).save(path)
    tools = eyes(data, tiny_eyes)
    found = evaluate(None, ["clipscore"], output=tmp_path / "o", images=tmp_path / "p", tools=tools)["tasks"][
        "clipscore"
    ]
    rows = [json.loads(line) for line in (tmp_path / "o" / "clipscore" / "scores.jsonl").read_text().splitlines()[1:]]
    assert found["overall"] == pytest.approx(max(np.mean([row["score"] for row in rows]), 0))
    assert found["about"]["clip"] == tiny_eyes[1]
    bench_data("mjhq_fid", {"meta_data.json": "{}"})
    with pytest.raises(UserError, match="--limit 5: mjhq_fid of a part"):
        evaluate(None, ["mjhq_fid"], output=tmp_path / "o", images=tmp_path / "p", tools=tools, limit=5)
    with pytest.raises(UserError, match="needs 30,000"):
        evaluate(None, ["mjhq_fid"], output=tmp_path / "o", images=tmp_path / "p", tools=tools)
    for wrong, words in (
        ({"tasks": ["genevl"]}, "Did you mean 'geneval'"),
        ({"tasks": ["geneval"], "output": None}, "needs --output"),
        ({"tasks": ["geneval"]}, "needs a model, or --images"),
        ({"tasks": ["toyeval"], "only": "score"}, "in one go"),
        ({"tasks": ["geneval"], "only": "scor"}, "Did you mean 'score'"),
        ({"tasks": ["geneval"], "only": "generate", "images": "x"}, "nothing is left to generate"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate(None, **{"output": tmp_path / "o", "tools": tools, **wrong})


def test_paired_differences() -> None:
    rng = np.random.default_rng(0)
    first = {("a", str(n)): [float(rng.random() < 0.5)] for n in range(200)}
    better = {key: [min(1.0, values[0] + (int(key[1]) % 5 == 0))] for key, values in first.items()}
    found = paired(first, better, "categories")["overall"]
    assert found[2] == pytest.approx(found[1] - found[0])
    assert 0 < found[3] < found[2] < found[4]
    gap, low, high = paired(first, first, "items")["overall"][2:]
    assert gap == 0
    assert -0.02 < low < 0 < high < 0.02, "200 items that agree leave little doubt, and some"
    assert paired(first, {("b", "1"): [1.0]}, "categories") == {}
