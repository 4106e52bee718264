"""Commands about recipes and runs."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from diptych.cli.main import main
from diptych.cli.train import example
from diptych.core.errors import UserError
from diptych.recipes import train as training
from diptych.recipes.quickstart_folder import MARKER, check_room, clear, marked


def test_train_resume_and_another_recipe(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny.yaml", "--set", "stages.mix.steps=2", "seed=4"]) == 0
    assert Path("runs/tiny/model/config.json").is_file()
    assert yaml.safe_load(Path("runs/tiny/recipe.yaml").read_text())["seed"] == 4
    assert "done: runs/tiny/model" in capsys.readouterr().out
    assert main(["curves", "runs/tiny", "-o", "losses.png"]) == 0
    assert capsys.readouterr().out == "losses.png\n"
    assert Path("losses.png").stat().st_size > 1000
    assert main(["curves", "runs/tin"]) == 2
    assert "runs/tin: no metrics.jsonl" in capsys.readouterr().err
    assert main(["train", "tiny.yaml", "--set", "stages.mix.steps=2", "seed=4"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["train", "tiny.yaml", "--resume", "--set", "stages.mix.steps=2"]) == 2
    assert "has another recipe (seed: 4 there, 1 here)" in capsys.readouterr().err
    assert main(["train", "tiny.yaml", "--resume", "--out", "elsewhere"]) == 2
    assert not Path("elsewhere").exists()


def test_a_stopped_run_says_how_to_go_on(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "train_recipe", lambda *args, **options: False)
    assert main(["train", "tiny.yaml", "--set", "seed=4"]) == 130
    said = capsys.readouterr().out
    assert said == "stopped and saved; continue with: diptych train tiny.yaml --out runs/tiny --resume --set seed=4\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.mix.step=2", "Did you mean 'steps'?"),
        ("stages.mix.steps=many", "stages.mix.steps: needs a whole number, not 'many'"),
        ("stages.mix.train=[decodr]", "Did you mean 'decoder'?"),
        ("stages.mix.data.size=30", "size 30x30 is not divisible by 8"),
        ("stages.mix.data.sources.pairs.task=edits", "Did you mean 'edit'?"),
        ("system.decoder.kind=mmdt", "Did you mean 'mmdit'?"),
        ("system.backbone.weights=gone", "gone"),
        ("stages.mix.settings.mask_rato=1", "Did you mean 'mask_ratio'?"),
        ("nothing", "key=value"),
    ],
)
@pytest.mark.parametrize("command", ["train", "check"])
def test_recipes_that_do_not_work(
    command: str, change: str, message: str, tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "tiny.yaml", "--set", change]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("diptych: error: ")
    assert message in line
    assert not Path("runs").exists()


def test_check_names_what_is_broken(tiny_plain: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos").mkdir()
    for number in range(10):
        Image.new("RGB", (40, 48), (25 * number, 0, 0)).save(f"photos/{number}.png")
        Path(f"photos/{number}.txt").write_text("a red square")
    Path("photos/9.txt").unlink()
    Path("photos/3.png").write_bytes(b"no picture")
    sources = tiny_plain["stages"]["mix"]["data"]["sources"]
    sources["pairs"] = {"kind": "folder", "task": "text_to_image", "path": "photos"}
    tiny_plain["stages"]["mix"]["data"]["max_bad_fraction"] = 0.05
    Path("r.yaml").write_text(yaml.safe_dump(tiny_plain))
    assert main(["check", "r.yaml", "--output", "sheets"]) == 0
    said = capsys.readouterr().out
    assert "pairs (text_to_image): 9 items, 8 usable" in said
    assert "1 dropped: no caption" in said
    assert "pairs/3.png: " in said
    assert "decoder" in said
    assert "66.1k" in said
    assert "time: about" in said
    with Image.open("sheets/mix.png") as sheet:
        assert sheet.width > 200

    for number in range(8):
        Path(f"photos/{number}.png").write_bytes(b"no picture")
    assert main(["check", "r.yaml", "--output", "none"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "unreadable, more than max_bad_fraction 5.00%" in err
    assert "pairs/0.png" in err
    assert Path("none/mix.png").is_file(), "what can be read is drawn"


def test_check_names_the_row(tiny_plain: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").write_text('{"image": "a.png", "text": "x"}\n{"image": \n')
    sources = tiny_plain["stages"]["mix"]["data"]["sources"]
    sources["pairs"] = {"kind": "jsonl", "task": "text_to_image", "path": "rows.jsonl"}
    Path("r.yaml").write_text(yaml.safe_dump(tiny_plain))
    assert main(["check", "r.yaml"]) == 2
    assert "rows.jsonl:2" in capsys.readouterr().err


def test_recipes(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert "iomm/b_pretrain_image" in capsys.readouterr().out
    assert main(["recipes", "hieraquery/ab"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.startswith("hieraquery/ablation/") and len(line) <= 120 for line in lines)
    assert main(["recipes", "iomm/b_pretrain_imaje"]) == 2
    assert "iomm/b_pretrain_image" in capsys.readouterr().err
    assert main(["recipes", "tiny.yaml", "--set", "sample_prompts=[一個の円]"]) == 0
    assert "- 一個の円" in capsys.readouterr().out
    assert main(["recipes", "tiny.yaml", "--set", "seed=9"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("# A tiny recipe.\n# not run\n")
    assert yaml.safe_load(said)["seed"] == 9


def test_confusions_and_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["confusions", "--count", "20"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("shapes", "triangle", "lavender", "missed", "without any error: 1.0000"))
    assert main(["doctor", "--quick"]) == 0
    said = capsys.readouterr().out
    assert "[ ok ] torch" in said
    assert "FAIL" not in said


def test_quickstart(tiny_model: Path, tiny_recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["quickstart", "--model", str(tiny_model), "--recipe", "tiny.yaml", "--limit", "6"]
    assert main([*command, "--steps", "2"]) == 0
    out, err = capfd.readouterr()
    assert out.count("  diptych ") == 3
    assert "toyeval, before" in err
    folder = Path("runs/quickstart")
    found = json.loads((folder / "results.json").read_text())
    assert found["steps"] == 2
    assert 0 <= found["before"]["toyeval"]["overall"] <= 1
    assert found["after"]["toyeval"]["counting"]["count"] == 1
    assert found["seconds"] > 0
    names = ["report.html", "before.png", "after.png", "curves.svg", "metrics.jsonl", "model/config.json"]
    assert all((folder / name).is_file() for name in names)
    assert list((folder / "checkpoints").iterdir())

    kept = (folder / "report.html").read_bytes()
    assert main(command) == 2
    assert "runs/quickstart: holds a quick start already. See runs/quickstart/report.html" in capfd.readouterr().err
    assert (folder / "report.html").read_bytes() == kept
    assert main([*command, "--out", ".", "--force"]) == 2
    assert "left alone" in capfd.readouterr().err
    check_room(folder, force=True)


def test_force_removes_what_the_quick_start_made_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with marked(folder):
        for name in ("results.json", "model/config.json", "checkpoints/step-00000002/state.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("ours")
    (folder / "notes.txt").write_text("mine")
    (folder / "elsewhere").symlink_to(tmp_path)
    check_room(folder, force=True)
    clear(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["elsewhere", "notes.txt"]
    assert (folder / "notes.txt").read_text() == "mine"


def test_force_leaves_a_folder_alone_that_merely_looks_like_a_run(tmp_path: Path) -> None:
    for name in ("results.json", "recipe.yaml", "thesis.tex"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="holds other files, which are left alone"):
        check_room(tmp_path, force=True)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("marker", ["", "[]", "{", '{"made": 3}', '{"made": ["../victim"]}', '{"made": ["/victim"]}'])
def test_a_marker_that_lies_removes_nothing(marker: str, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).write_text(marker)
    with pytest.raises(UserError):
        check_room(tmp_path / "out", force=True)
    assert (tmp_path / "victim").is_file()


def test_a_killed_quick_start_can_be_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    (folder / MARKER).write_text('{"others": ["mine.txt"]}')
    for name in ("recipe.yaml", "checkpoints/step-00000002/state.json", ".recipe.yaml.7.partial"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("ours")
    (folder / "model").mkdir()
    (folder / "model" / "my.docx").write_text("mine")
    with pytest.raises(UserError, match=r"model/my\.docx was not made by the quick start"):
        check_room(folder, force=True)
    (folder / "model" / "my.docx").unlink()
    clear(folder)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_index_of_a_recipe_reads_each_source_its_own_way(
    tiny_plain: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Columns of edits and the caption's key are the recipe's; a path alone could not say them."""
    picture = io.BytesIO()
    Image.new("RGB", (20, 30)).save(picture, "PNG")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(2):
            members = {"input.png": picture.getvalue(), "edited.png": picture.getvalue(), "json": b'{"ask": "blue"}'}
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    shards = {"kind": "webdataset", "path": str(tmp_path / "0.tar")}
    columns = {"image": "edited.png", "source": "input.png", "instruction": "ask"}
    sources = tiny_plain["stages"]["mix"]["data"]["sources"]
    sources |= {"edits": {**shards, "task": "edit", "columns": columns}}
    recipe = tmp_path / "r.yaml"
    recipe.write_text("# A recipe.\n# not run\n" + yaml.safe_dump(tiny_plain))
    assert main(("index", str(recipe))) == 0
    assert "mix/edits: 2 items, task edit\n  0 images with an unreadable header" in capsys.readouterr().out
    assert main(("index", str(tmp_path / "0.tar"), "--task", "edit")) == 2
    assert main(("index", str(recipe), "--task", "edit")) == 2
    assert "--task goes with paths" in capsys.readouterr().err
    assert main(("index", str(tmp_path / "0.tar"), "--set", "seed=1")) == 2
    del sources["edits"]
    recipe.write_text("# A recipe.\n# not run\n" + yaml.safe_dump(tiny_plain))
    assert main(("index", str(recipe))) == 2
    assert "nothing to index" in capsys.readouterr().err


def test_what_to_try_is_of_the_run(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sample_prompts: [zxv a frog]")
    assert example(tmp_path) == f"diptych generate {tmp_path} 'zxv a frog'"
    recipe.write_text("sample_edits: [{text: bluer, images: [/in.png]}]")
    assert example(tmp_path) == f"diptych edit {tmp_path} /in.png bluer"
    recipe.write_text("seed: 0")
    assert example(tmp_path) == f'diptych generate {tmp_path} "a red circle"'
    recipe.write_text("system: {kind: mllm}")
    assert example(tmp_path) == f'diptych ask {tmp_path} picture.png "what is in the picture?"'
