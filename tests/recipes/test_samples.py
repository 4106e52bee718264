"""What a run draws on its way: captioned sheets of prompts and edits, CLIPScores, and where they go besides."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.core.errors import UserError
from diptych.core.sample import Sample
from diptych.recipes.plain import load_plain
from diptych.recipes.recipe import load, parse
from diptych.recipes.run import train_recipe
from diptych.recipes.samples import captioned
from diptych.training.metrics import Drawn, Metrics, flat, read_metrics
from shared import made_once, make_clip

PROMPTS = ["a red clock", "two green cow", "a photo of a bench"]


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "clip", make_clip)


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, clip: Path, _tiny_plain: dict[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """A run of three steps that draws prompts and edits at steps 2 and 3, with TensorBoard and W&B."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("drawn")
    Image.new("RGB", (48, 48), "red").save(folder / "red.png")
    plain = copy.deepcopy(_tiny_plain)
    plain["sample_prompts"] = PROMPTS
    plain["sample_edits"] = [{"text": "a green bench", "images": [str(folder / "red.png")]}]
    plain["run"] |= {"sample_every": 2, "sample_clip": str(clip), "tensorboard": True, "trackers": ["wandb"]}
    train_recipe(parse(plain), plain, folder / "run")
    return folder / "run", plain


def test_sheets_lie_in_the_run_folder(run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = run
    names = sorted(path.name for path in (folder / "samples").iterdir())
    steps = [f"step-{step:08d}" for step in (2, 3)]
    assert names == [f"{step}{end}" for step in steps for end in ("-edits.png", ".json", ".png")]
    for name in names:
        if name.endswith(".png"):
            with Image.open(folder / "samples" / name) as sheet:
                assert sheet.height > 60  # the picture, and its caption beneath


def test_prompts_are_scored_as_transformers_own_clip_does(run: tuple[Path, dict[str, Any]], clip: Path) -> None:
    """Pixels prepared, and cosines taken, by transformers' processor and model."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    from diptych.recipes.load import load as load_model

    folder, plain = run
    told = json.loads((folder / "samples" / "step-00000003.json").read_text())
    assert [row["prompt"] for row in told["prompts"]] == PROMPTS
    pictures = load_model(str(folder / "model"), device="cpu").generate(PROMPTS, seed=plain["seed"])
    model: Any = CLIPModel.from_pretrained(clip).eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tokens: Any = AutoTokenizer.from_pretrained(clip)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=processor(pictures, return_tensors="pt")["pixel_values"], **tokens)
    cosine = torch.cosine_similarity(out.image_embeds, out.text_embeds)
    expected = [max(100 * float(x), 0) for x in cosine]
    assert [row["clipscore"] for row in told["prompts"]] == pytest.approx(expected, abs=0.05)
    mean = max(100 * float(cosine.mean()), 0)
    assert told["clipscore"] == pytest.approx(mean, abs=0.05)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "sample/clipscore" in row]
    assert [row["step"] for row in rows] == [2, 3]
    assert rows[-1]["sample/clipscore"] == told["clipscore"]


def test_tensorboard_has_numbers_and_pictures(run: tuple[Path, dict[str, Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = run
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("sample/clipscore")] == [2, 3]
    assert [event.step for event in board.Scalars("lr")] == [1, 2, 3]
    for tag in ("samples", "samples-edits"):
        images = board.Images(tag)
        assert [event.step for event in images] == [2, 3]
        name = "step-00000003.png" if tag == "samples" else "step-00000003-edits.png"
        with Image.open(folder / "samples" / name) as sheet:
            assert (images[-1].width, images[-1].height) == sheet.size


def test_wandb_is_offline_and_has_numbers_and_pictures(run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = run
    (offline,) = (folder / "wandb").glob("offline-run-*")
    (record,) = offline.glob("*.wandb")
    written = record.read_bytes()
    for name in ("sample/clipscore", "loss/flow.text_to_image", "stages.mix.batch_size"):
        assert name.encode() in written
    media = sorted(path.name.rpartition("_")[0] for path in (offline / "files" / "media" / "images").iterdir())
    assert media == ["samples-edits_2", "samples-edits_3", "samples_2", "samples_3"]
    assert not (folder / "wandb" / "latest-run" / "files" / "output.log").exists()  # what the terminal says stays there


def test_mlflow_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, pictures and the recipe lie in the run folder; a resumed run is the same one."""
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sheet = tmp_path / "samples" / "step-00000002.png"
    sheet.parent.mkdir()
    Image.new("RGB", (32, 32), "red").save(sheet)
    for start in (0, 1):
        given: dict[str, Any] = {"start": start, "tensorboard": False, "trackers": ["mlflow"], "recipe": {"seed": 7}}
        metrics = Metrics(tmp_path, **given)
        metrics.write(start + 1, "mix", {"loss/flow.image": 0.5})
        with Image.open(sheet) as picture:
            metrics.draw(start + 1, "mix", Drawn(sheets={sheet: picture}))
        metrics.close()
    (values,) = tmp_path.glob("mlruns/*/*/metrics/loss/flow.image")
    assert [line.split()[1:] for line in values.read_text().splitlines()] == [["0.5", "1"], ["0.5", "2"]]
    assert len(list(tmp_path.glob("mlruns/*/*/artifacts/samples/step-00000002.png"))) == 1
    assert [path.read_text() for path in tmp_path.glob("mlruns/*/*/params/seed")] == ["7"]


def test_recipes_are_told_in_flat_names() -> None:
    told = flat({"a": {"b": [1, 2], "c": None, "d": {"e": 0.5}}, "f": "x"})
    assert told == {"a.b": "[1, 2]", "a.c": "None", "a.d.e": 0.5, "f": "x"}


def test_pictures_keep_their_size_on_a_sheet() -> None:
    """An edit's sheet has room for the images that are read, an arrow, and the one that is made."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 300, 260, generator=generator) * 2 - 1
    plain = Sample(id="a", task="text_to_image", text="a", image=image)
    levels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    for sample in (plain, Sample(id="a", task="edit", text="a", image=image, context_images=(image, image))):
        page = np.asarray(captioned([sample]))
        windows = np.lib.stride_tricks.sliding_window_view(page, (1, 260, 3))[:, :, 0, 0]
        assert any((row == levels[7]).all() for row in windows.reshape(-1, 260, 3))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sample_edits": [{"text": "a", "images": ["nowhere.png"]}]}, r"nowhere\.png: image file missing"),
        ({"sample_edits": [{"text": " ", "images": ["a.png"]}]}, "an edit needs text and images"),
        ({"run": {"sample_clip": "x"}}, "sample_clip scores pictures that are drawn, and sample_every is 0"),
        ({"run": {"sample_every": 1, "sample_clip": "no/where"}}, r"run\.sample_clip no/where: the commit to take"),
        (
            {"run": {"sample_every": 1, "sample_clip": str(Path(__file__).parent)}},
            r"run\.sample_clip .*: could not be loaded: its config\.json",
        ),
        ({"run": {"trackers": ["wandb", "wandb"]}}, "trackers names one twice"),
        ({"run": {"trackers": ["comet"]}}, r"run\.trackers\[0\]: .*wandb"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_run(
    change: dict[str, Any], said: str, tiny_plain: dict[str, Any], tmp_path: Path
) -> None:
    plain = {**tiny_plain, "sample_prompts": PROMPTS, **change, "run": {**tiny_plain["run"], **change.get("run", {})}}
    with pytest.raises(UserError, match=said):
        train_recipe(parse(plain), plain, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_tracker_that_is_not_installed_is_named(
    tiny_plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diptych.training.metrics.find_spec", lambda name: None)
    tiny_plain["run"]["trackers"] = ["mlflow"]
    with pytest.raises(UserError, match=r"run\.trackers: mlflow is not installed; pip install 'diptych\[trackers\]'"):
        train_recipe(parse(tiny_plain), tiny_plain, tmp_path / "run")


def test_paths_of_edits_are_the_recipes(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    file = write_recipe(tmp_path)
    assert load_plain(str(file))["sample_edits"][0]["images"] == [str(tmp_path / "red.png"), "/elsewhere/blue.png"]
    assert load(str(file))[0].sample_edits[0].text == "make it blue"


@pytest.fixture
def write_recipe() -> Callable[..., Path]:
    def write(folder: Path) -> Path:
        text = "base: toy/quickstart\nsample_edits:\n- {text: make it blue, images: [red.png, /elsewhere/blue.png]}\n"
        (folder / "mine.yaml").write_text(text)
        return folder / "mine.yaml"

    return write
