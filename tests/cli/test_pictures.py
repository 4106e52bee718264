"""Pictures by command: what they are named, what they carry, files that are there, and files of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diptych.cli import options
from diptych.cli.main import main
from diptych.cli.prompt_file import file_names
from diptych.inference.engine import Engine


def carried(file: Path | str) -> dict[str, Any]:
    with Image.open(file) as image:
        image.load()
        return {**image.info, "size": image.size, "bytes": image.tobytes()}


def out(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_picture_carries_all_that_makes_it_again(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tiny_model), "a red circle", "two", "--n", "2", "--seed", "5", "--cfg", "3"]) == 0
    assert out(capsys) == ["a-red-circle-1.png", "a-red-circle-2.png", "two-1.png", "two-2.png"]
    told = carried("two-2.png")
    assert (told["prompt"], told["model"], told["seed"]) == ("two", str(tiny_model), "6")
    settings = json.loads(told["settings"])
    assert (settings["cfg"], settings["steps"], settings["solver"]) == (3.0, 2, "euler")
    again = ["generate", told["model"], told["prompt"], "--seed", told["seed"], "--cfg", "3", "-o", "again.png"]
    assert main(again) == 0
    assert carried("again.png")["bytes"] == told["bytes"]


def test_an_edit_carries_its_source(tiny_model: Path) -> None:
    Image.new("RGB", (32, 32), "red").save("in.png")
    assert main(["edit", str(tiny_model), "in.png", "bluer", "--n", "2", "--image-cfg", "1.5"]) == 0
    told = carried("in-edited-2.png")
    assert (told["instruction"], told["source"], told["seed"]) == ("bluer", "in.png", "1")
    assert json.loads(told["settings"])["image_cfg"] == 1.5
    assert main(["edit", str(tiny_model), "in.png", "bluer", "--seed", "1", "--image-cfg", "1.5", "-o", "b.png"]) == 0
    assert carried("b.png")["bytes"] == told["bytes"]


def test_files_that_are_there_are_kept(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(tiny_model), "two", "-o", "a.png"]
    assert main(words) == 0
    before = carried("a.png")["bytes"]
    for command in (words, ["edit", str(tiny_model), "a.png", "bluer", "-o", "a.png"]):
        assert main([*command, "--seed", "3"]) == 2
        assert "a.png: exists already; give another -o, or --overwrite" in capsys.readouterr().err
    assert carried("a.png")["bytes"] == before
    assert main([*words, "--seed", "3", "--overwrite"]) == 0
    assert carried("a.png")["bytes"] != before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["two", "--steps", "0"], "steps must be at least 1"),
        (["two", "--cfg", "-1"], "must not be negative"),
        (["two", "--solver", "eular"], "Did you mean 'euler'"),
        (["two", "--size", "0x4"], "write it as 512"),
        (["two", "--timestep-shift", "roof"], "'root', 'flux' or 'qwen_image'"),
        (["two", " "], "prompt 1 is empty"),
        (["two", "three", "-o", "a.png"], "one file, but 2 images"),
        ([], "give PROMPTs or --prompts FILE"),
        (["two", "--prompts", "a.txt"], "give PROMPTs or --prompts FILE"),
        (["--prompts", "none.txt"], "--prompts none.txt: no such file"),
        (["--prompts", "bad.jsonl"], "bad.jsonl:2: unknown key 'setps'. Did you mean 'steps'"),
        (["--prompts", "worse.jsonl"], "worse.jsonl:1: n must be a whole number, not 0"),
        (["--prompts", "worst.jsonl"], "worst.jsonl:1: steps must be at least 1"),
    ],
)
def test_mistakes_are_refused_before_the_model_is_loaded(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loaded(args: object) -> Engine:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(options, "open_model", loaded)
    Path("a.txt").write_text("two\n")
    Path("bad.jsonl").write_text('{"prompt": "two"}\n{"prompt": "two", "setps": 3}\n')
    Path("worse.jsonl").write_text('{"prompt": "two", "n": 0}\n')
    Path("worst.jsonl").write_text('{"prompt": "two", "steps": 0}\n')
    assert main(["generate", "toy/iomm", *words]) == 2
    assert message in capsys.readouterr().err


def test_names_of_prompts() -> None:
    assert file_names(["A red circle!", "a red circle", "a red circle?", "", "赤い円"]) == [
        "a-red-circle", "a-red-circle-2", "a-red-circle-3", "image", "赤い円",
    ]  # fmt: skip
    assert file_names(["two", "two"], ["mine", ""]) == ["mine", "two"]


def test_a_file_of_prompts_is_gone_on_with(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"prompt": "a red circle"},
        {"prompt": "two", "seed": 9, "n": 2},
        {"prompt": "two", "cfg": 1.0, "name": "plain"},
        {"prompt": "three", "size": [16, 24]},
    ]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    words = ["generate", str(tiny_model), "--prompts", "prompts.jsonl", "-o", "made", "--seed", "4"]
    generate = Engine.generate
    calls: list[int] = []

    def stopped(self: Engine, prompts: list[str], **options: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, prompts, **options)

    monkeypatch.setattr(Engine, "generate", stopped)
    assert main(words) == 130
    assert out(capsys) == ["made/a-red-circle.png", "made/two-1.png", "made/two-2.png"], "written as they are made"
    first = carried("made/two-2.png")
    assert main(words) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == ["made/plain.png", "made/three.png"]
    assert "3 of 5 images are there already" in told.err
    assert calls == [3, 1, 1, 1]
    assert (first["seed"], carried("made/plain.png")["seed"]) == ("10", "4")
    assert carried("made/three.png")["size"] == (24, 16)
    assert json.loads(carried("made/plain.png")["settings"])["cfg"] == 1.0
    assert carried("made/two-2.png") == first
    assert main([*words, "--steps", "1"]) == 2
    assert "made/a-red-circle.png: exists already and was made otherwise" in capsys.readouterr().err


def test_a_text_file_of_prompts(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text("# mine\n\na red circle\ntwo\n")
    assert main(["generate", str(tiny_model), "--prompts", "prompts.txt", "-o", "made"]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == ["made/a-red-circle.png", "made/two.png"]
    assert "4/4" in told.err or "step" in told.err, "the bar counts steps"


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("generate", ["--size", "33"], "size 33x33 is not divisible by"),
        ("generate", ["--scales", "4x4"], "this model makes images at one scale"),
        ("generate", ["--prompt-expansion", "4"], "this model cannot expand prompts"),
        ("edit", ["--size", "33"], "size 33x33 is not divisible by"),
    ],
)
def test_what_this_model_does_not_take_is_refused_before_its_weights_are_read(
    command: str,
    options: list[str],
    message: str,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("RGB", (32, 32)).save("in.png")

    def loaded(*given: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("diptych.recipes.load.load_system", loaded)
    words = ["two"] if command == "generate" else ["in.png", "bluer"]
    assert main([command, str(tiny_model), *words, *options, "-o", "a.png"]) == 2
    assert message in capsys.readouterr().err
