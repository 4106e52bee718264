"""docs/your-pictures.md, followed as it stands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import yaml
from PIL import Image

from diptych.cli.main import main
from diptych.core.errors import UserError
from diptych.core.sample import Task
from diptych.recipes import new
from diptych.recipes.build import build_system
from diptych.recipes.new import new_recipe
from diptych.recipes.recipe import load
from diptych.recipes.run import check_parts, check_sizes
from diptych.systems.composed import ComposedSystem

PAGE = Path(__file__).parent.parent / "docs" / "your-pictures.md"
SUBJECTS = {"an astronaut": skimage.data.astronaut, "coffee": skimage.data.coffee, "a cat": skimage.data.chelsea}


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 captioned cuttings of photographs, of several shapes."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    chance = np.random.default_rng(0)
    photographs = {subject: Image.fromarray(np.asarray(read())).convert("RGB") for subject, read in SUBJECTS.items()}
    for number, (subject, picture) in enumerate(list(photographs.items()) * 20):
        left, top = (int(value) for value in chance.integers(0, 100, 2))
        picture.crop((left, top, left + 200, top + 150)).resize((64, 48 + number % 3 * 16)).save(
            folder / f"{number}.png"
        )
        (folder / f"{number}.txt").write_text(f"a photograph of {subject}, number {number}")
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [
        shlex.split(line)[1:]
        for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
        for line in block.splitlines()
    ]
    assert [command[0] for command in commands] == [
        "new",
        "check",
        "train",
        "generate",
        "new",
        "prepare",
        "lora",
        "generate",
    ]
    short = {"train": ["--set", "stages.tune.steps=2", "run.sample_every=0"], "generate": ["--steps", "2"]}
    for command in commands:
        assert main([*command, *short.get(command[0], [])]) == 0, command
    assert "path: pictures}" in Path("mine.yaml").read_text(), "relative to the recipe"
    assert "path: pictures, prepared: pictures.prepared}" in Path("fast.yaml").read_text()
    out = capsys.readouterr().out
    assert "60 usable for task text_to_image" in out
    for command in (commands[1], commands[2], commands[5]):
        assert " ".join(["diptych", *command]) in out, "the page's commands are those that are printed"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    with Image.open("frog.png") as drawn, Image.open("again.png") as again:
        assert np.abs(np.asarray(drawn, dtype=int) - np.asarray(again, dtype=int)).max() <= 1


@pytest.mark.slow
def test_a_card_decides(pictures: Path) -> None:
    with pytest.raises(UserError, match=r"--card 1MB: not even one image of \d+ px a pass fits; that takes about"):
        new_recipe(pictures, "toy/iomm", card="1MB")
    reason = new_recipe(pictures, "toy/iomm", card="10GB").reason
    assert reason.startswith("images of 32 px, 4 a pass")


def test_the_recipe_is_whole(pictures: Path, tmp_path: Path) -> None:
    """No sources, prompts or stages of a base remain."""
    text, look, *_ = new_recipe(pictures, "toy/omnigen2")
    (tmp_path / "mine.yaml").write_text(text)
    recipe, _ = load(str(tmp_path / "mine.yaml"))
    assert "base:" not in text
    assert list(recipe.stages) == ["tune"]
    assert list(recipe.stages["tune"].data.sources) == ["mine"]
    assert set(recipe.sample_prompts) <= set(look.texts)
    stage = recipe.stages["tune"]
    assert (stage.steps, stage.batch_size, stage.data.held_out, stage.data.buckets) == (375, 4, 6, 2.0)
    assert (stage.optimizer.lr, stage.schedule.warmup, stage.schedule.end) == (1e-3, 37, 0.1)
    assert len(recipe.sample_prompts) == 4
    assert recipe.run.precision == "fp32"
    # What the model wrote before each image is of what it had learned: "a frog" became a red cross.
    assert load("toy/omnigen2")[0].sampling.prompt_expansion > 0
    assert recipe.sampling.prompt_expansion == 0
    assert recipe.sampling.steps == load("toy/omnigen2")[0].sampling.steps == 8


def test_edits_are_drawn_while_they_are_learned(pictures: Path, tmp_path: Path) -> None:
    """The recipe of a folder of edits names some of them, by paths that hold wherever it lies."""
    folder = tmp_path / "edits"
    folder.mkdir()
    names = [f"{number}.png" for number in range(6)]
    for name in names:
        Image.new("RGB", (32, 32), "red").save(folder / name)
    rows = [{"source": name, "image": "0.png", "instruction": f"redder than {name}"} for name in names]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = new_recipe(folder, "toy/omnigen2", task="edit", home=tmp_path).text
    (tmp_path / "mine.yaml").write_text(text)
    recipe, _ = load(str(tmp_path / "mine.yaml"))
    assert [edit.text for edit in recipe.sample_edits] == [f"redder than {number}.png" for number in (0, 1, 3, 5)]
    assert [edit.images for edit in recipe.sample_edits] == [(str(folder / f"{n}.png"),) for n in (0, 1, 3, 5)]
    assert recipe.run.sample_every


def test_loss_masks_are_noticed(pictures: Path, tmp_path: Path) -> None:
    """`masks` may lack where some pictures have none."""
    folder = tmp_path / "masked"
    folder.mkdir()
    for picture in sorted(pictures.iterdir())[:8]:
        (folder / picture.name).write_bytes(picture.read_bytes())
    images = sorted(path for path in folder.iterdir() if path.suffix != ".txt")
    for place, image in enumerate(images):
        with Image.open(image) as opened:
            Image.new("L", opened.size, 255).save(folder / f"{image.stem}.mask.png")
        missing = "error" if image == images[-1] else "full_weight"
        text, look, *_ = new_recipe(folder, "toy/iomm")
        assert (look.masks, look.items) == (place + 1, len(images))
        assert yaml.safe_load(text)["stages"]["tune"]["data"]["sources"]["mine"]["masks"] == {"missing": missing}


def test_nothing_is_overwritten(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("mine")
    assert main(["new", str(pictures), "--model", "toy/iomm", "--output", "mine.yaml"]) == 2
    assert "mine.yaml: exists already" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == "mine"


def test_a_trigger_and_a_card_for_a_large_model(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank and quantised parts are those of the library's recipe for the card; the step's size is counted elsewhere."""
    monkeypatch.setattr(new, "fitting", lambda settings, look, card: (settings, ""))
    text = new_recipe(pictures, "toy/omnigen2", trigger="sks").text
    plain = yaml.safe_load(text)
    assert plain["stages"]["tune"]["data"]["sources"]["mine"]["vary"] == {"trigger": "sks"}
    assert all(prompt.startswith("sks, ") for prompt in plain["sample_prompts"])
    monkeypatch.setattr(new, "LARGE", 1)
    assert "prepared" not in text
    for card, rank, quantized, optimizer in (
        ("11GB", 16, True, "adamw8bit"),
        ("24GB", 32, False, "adamw8bit"),
        ("79GB", 32, False, "adamw8bit"),
        ("80GB", 32, False, "adamw"),
        ("141GB", 32, False, "adamw"),
    ):
        text = new_recipe(pictures, "toy/omnigen2", card=card).text
        source = yaml.safe_load(text)["stages"]["tune"]["data"]["sources"]["mine"]
        assert source["prepared"] == f"{pictures}.prepared"
        system = yaml.safe_load(text)["system"]
        assert system["decoder"]["lora"]["rank"] == rank
        assert yaml.safe_load(text)["stages"]["tune"]["optimizer"]["kind"] == optimizer
        assert [system[part].get("quantize") for part in ("decoder", "backbone") if part in system] == (
            ["nf4", "nf4"] if quantized else [None]
        )
    with pytest.raises(UserError, match="--trigger sks: task image has no captions"):
        new_recipe(pictures, "toy/omnigen2", task="image", trigger="sks")


@pytest.mark.slow
def test_what_each_step_would_make_again_is_made_once(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`new` names what to prepare, `check` says before and after what it saves, and a run reads it."""
    assert main(["new", "pictures", "--model", "toy/omnigen2", "--trigger", "zxv", "--prepare"]) == 0
    prepare = ["prepare", "pictures.yaml", "--what", "states"]
    assert " ".join(["diptych", *prepare]) in capsys.readouterr().out
    check = ["check", "pictures.yaml", "--limit", "4"]
    assert main(check) == 0
    out = capsys.readouterr().out
    assert re.search(r"prepared states save \d+% of these operations", out)
    assert "mine: states not prepared yet, in " in out
    assert f"the run can begin after  {' '.join(['diptych', *prepare])}" in out
    train = ["train", "pictures.yaml", "--out", "run", "--set", "stages.tune.steps=1", "run.sample_every=0"]
    assert main(train) == 2
    assert "no such folder of prepared data; make it with diptych prepare" in capsys.readouterr().err
    assert main(prepare) == 0
    assert main(check) == 0
    out = capsys.readouterr().out
    assert "prepared states of 60 items, whole" in out
    assert "no fault: the run can begin\n" in out
    read: list[object] = []
    run = ComposedSystem.read
    monkeypatch.setattr(ComposedSystem, "read", lambda self, *given: read.append(given) or run(self, *given))
    assert main([*train, "stages.tune.data.held_out=0", "run.validate_every=0", "run.tensorboard=false"]) == 0
    assert not read, "the MLLM does not run"


@pytest.mark.slow
def test_prepared_data_of_another_model_are_a_fault_that_check_lists(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in ("omnigen2", "iomm"):
        assert main(["new", "pictures", "--model", f"toy/{model}", "--output", f"{model}.yaml", "--prepare"]) == 0
    assert main(["prepare", "omnigen2.yaml", "--what", "states"]) == 0
    capsys.readouterr()
    assert main(["check", "iomm.yaml", "--limit", "4"]) == 2
    said = capsys.readouterr()
    assert "what the model will see: " in said.out, "the verdict comes last"
    assert "its states were made otherwise" in said.err


def test_a_model_without_such_states_keeps_its_latents(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BAGEL's are its language model's keys and values; and a grid of positions that ends takes no long images."""
    made = new_recipe(pictures, "toy/bagel")
    data = yaml.safe_load(made.text)["stages"]["tune"]["data"]
    assert made.prepares == ()
    assert "buckets" not in data
    assert "cache" not in data, "its autoencoder is the pixels themselves"
    with pytest.raises(UserError, match="--prepare: nothing of task text_to_image stays the same"):
        new_recipe(pictures, "toy/bagel", prepare=True)
    monkeypatch.setattr(new, "useful_kinds", lambda *given: ("latents",))
    data = yaml.safe_load(new_recipe(pictures, "toy/bagel", prepare=True).text)["stages"]["tune"]["data"]
    assert data["cache"] == f"{pictures}.latents"
    assert "prepared" not in data["sources"]["mine"]


def test_small_pictures_are_told(pictures: Path) -> None:
    Image.new("RGB", (5, 3)).save(pictures / "dot.png")
    (pictures / "dot.txt").write_text("a dot")
    reason = new_recipe(pictures, "toy/iomm").reason
    assert reason.endswith("; 1 are enlarged to it more than twice, the smallest 5x3 (filters.min_side)")


@pytest.mark.parametrize("model", ["toy/iomm", "toy/omnigen2", "toy/ovis-u1", "toy/bagel", "toy/hieraquery"])
@pytest.mark.parametrize("task", ["text_to_image", "edit", "understand"])
def test_every_model_takes_the_recipe_of_every_task(model: str, task: Task, pictures: Path, tmp_path: Path) -> None:
    """The layers that are named get adapters, and every size is one that the model makes."""
    rows: list[dict[str, Any]] = [
        {"source": f"{n}.png", "image": f"{n + 1}.png", "instruction": f"redder than {n}"} for n in range(4)
    ]
    if task == "understand":
        messages = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "red"}]
        rows = [{"images": [f"{n}.png"], "messages": messages} for n in range(4)]
    if task != "text_to_image":
        (pictures / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.yaml").write_text(new_recipe(pictures, model, task=task).text)
    recipe, _ = load(str(tmp_path / "mine.yaml"))
    system = build_system(recipe.system, meta=True)
    check_parts(recipe, system)
    if task != "understand":
        check_sizes(system, recipe.stages["tune"].data)


def test_adapters_that_a_model_has_learn_on(pictures: Path, tmp_path: Path) -> None:
    """Of another rank they could not be those of the model."""
    plain = yaml.safe_load(new_recipe(pictures, "toy/iomm").text)
    plain["system"]["decoder"]["lora"] = {"rank": 2, "alpha": 6.0, "targets": ["qkv"]}
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(plain))
    short = ["--set", "stages.tune.steps=1", "run.sample_every=0", "run.validate_every=0", "run.tensorboard=false"]
    assert main(["train", "first.yaml", "--out", "first", *short]) == 0
    (tmp_path / "second.yaml").write_text(new_recipe(pictures, "first").text)
    lora = yaml.safe_load((tmp_path / "second.yaml").read_text())["system"]["decoder"]["lora"]
    assert (lora["rank"], lora["alpha"], lora["targets"]) == (2, 6.0, ["qkv"])
    assert main(["train", "second.yaml", "--out", "second", *short]) == 0
