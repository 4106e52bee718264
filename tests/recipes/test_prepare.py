"""`diptych prepare`: what it writes, that training reads it and gets the same numbers, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import warm
from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.data import loader
from diptych.data.filters import Filters
from diptych.data.source import ItemDraws
from diptych.evaluation.image_scores import ImageScorer
from diptych.recipes import prepare as job
from diptych.recipes.check import check_data, check_system
from diptych.recipes.load import start
from diptych.recipes.prepare import Options, Work, prepare
from diptych.recipes.prepared import prepared_lines
from diptych.recipes.recipe import load, parse
from diptych.recipes.run import build_stage
from dying import prepare_and_die

SHAPES = [(40, 40), (40, 72), (72, 40), (36, 48), (64, 40), (33, 33), (40, 44), (48, 80), (20, 100)]
"""(height, width); the last is too wide for every bucket."""
AUTOENCODER: dict[str, Any] = {
    "kind": "kl",
    "config": {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
        "block_out_channels": [8, 8],
        "norm_num_groups": 4,
        "latent_channels": 3,
        "sample_size": 32,
    },
}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Nine captioned pictures of several shapes."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(SHAPES):
        picture = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a red circle")
    return folder


@pytest.fixture
def plain(tiny_plain: dict[str, Any], pairs: Path) -> dict[str, Any]:
    """A recipe over these pictures, as images and as pairs, in buckets."""
    tiny_plain["system"] |= {"autoencoder": AUTOENCODER, "cfg_dropout": 0.3}
    tiny_plain["stages"]["mix"]["data"] = {
        "size": 32,
        "buckets": 2.0,
        "sources": {
            "images": {"kind": "folder", "task": "image", "path": str(pairs)},
            "pairs": {"kind": "folder", "task": "text_to_image", "path": str(pairs)},
        },
    }
    return tiny_plain


def reading(plain: dict[str, Any], root: Path) -> dict[str, Any]:
    """The recipe with its sources' prepared data below `root`."""
    read = json.loads(json.dumps(plain))
    for name, source in read["stages"]["mix"]["data"]["sources"].items():
        source["prepared"] = str(root / name)
    return read


def losses(plain: dict[str, Any], steps: int = 4, system: Any = None) -> list[dict[str, list[float]]]:
    """The losses of a recipe's first steps, without learning."""
    recipe = parse(plain)
    system = system or start(recipe)
    stage = build_stage("mix", recipe.stages["mix"], recipe, system)
    rows: list[dict[str, list[float]]] = []
    for step in loader.steps(stage.data, system.preparer(), 0, steps):
        for part in step.passes:
            terms = system.losses(part.batch, Draws(list(part.keys)))
            rows.append({name: values.tolist() for name, values in terms.items()})
    return rows


def options(plain: dict[str, Any], root: Path, **given: Any) -> Options:
    return Options(**{"recipe": plain, "output": str(root), "shard_items": 3, "batch_size": 2, **given})


@pytest.mark.parametrize("kinds", [("latents",), ("features",), ("latents", "features", "sizes")])
def test_training_from_prepared_data_equals_training_without(
    plain: dict[str, Any], tmp_path: Path, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = losses(plain)
    root = tmp_path / "out"
    prepare(options(plain, root, kinds=kinds))
    read = reading(plain, root)
    if kinds == ("features",):  # pairs show the MLLM nothing
        del read["stages"]["mix"]["data"]["sources"]["pairs"]["prepared"]
    system = start(parse(read))
    if "latents" in kinds:
        monkeypatch.setattr(system.autoencoder, "encode", None)
    if "features" in kinds:
        monkeypatch.setattr(system.backbone, "vision_features", None)
    assert_equal(losses(read, system=system), wanted)


def assert_equal(found: list[dict[str, list[float]]], wanted: list[dict[str, list[float]]]) -> None:
    """To 1e-6, name by name."""
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    for mine, theirs in zip(found, wanted, strict=True):
        for name, values in mine.items():
            assert values == pytest.approx(theirs[name], abs=1e-6), name


def test_a_target_whose_latent_is_known_is_not_decoded(plain: dict[str, Any], tmp_path: Path) -> None:
    root = tmp_path / "out"
    prepare(options(plain, root))
    recipe = parse(reading(plain, root))
    system = start(recipe)
    stage = build_stage("mix", recipe.stages["mix"], recipe, system)
    samples = [sample for step in range(4) for sample in stage.data.batch(step)]
    assert all(sample.latent is not None for sample in samples)
    shown = {sample.task: sample.image is not None for sample in samples}
    assert shown == {"image": True, "text_to_image": False}  # the MLLM is shown an unlabelled image


def test_what_is_there_is_not_made_again(plain: dict[str, Any], tmp_path: Path) -> None:
    root = tmp_path / "out"
    first, _ = prepare(options(plain, root))
    assert {result.label: (result.written, result.there, result.items) for result in first} == {
        "images: latents": (3, 0, 8),
        "images: sizes": (3, 0, 9),
        "pairs: latents": (3, 0, 8),
        "pairs: sizes": (3, 0, 9),
    }
    files = sorted(root.rglob("*.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in files}
    files[1].unlink()
    files[4].write_bytes(files[4].read_bytes()[:-40])  # cut, as by a full disk
    (files[0].parent / f".00000.safetensors.{2**22}.partial.safetensors").write_bytes(b"half")  # of a killed process
    again, _ = prepare(options(plain, root, shard_items=5))
    assert sum(result.written for result in again) == 2
    assert sum(result.there for result in again) == 10
    assert {path for path in files if path.stat().st_mtime_ns == before[path]} == {*files} - {files[1], files[4]}
    assert not list(root.rglob("*.partial*"))


def test_check_says_what_lies_prepared(plain: dict[str, Any], tmp_path: Path) -> None:
    root = tmp_path / "out"
    del plain["stages"]["mix"]["data"]["sources"]["images"]
    prepare(options(plain, root))
    recipe = parse(reading(plain, root))
    [latents] = (root / "pairs").glob("latents-*")
    (root / "pairs/features-x").mkdir()
    assert prepared_lines("pairs", recipe.stages["mix"].data.sources["pairs"])[0] == (
        f"pairs: prepared latents of 9 items, whole, in {latents}"
    )
    found = check_data(recipe, check_system(recipe), "mix")
    assert f"pairs: prepared latents of 9 items, whole, in {latents}" in found.lines


def test_shards_are_plain_safetensors(plain: dict[str, Any], tmp_path: Path) -> None:
    root = tmp_path / "out"
    prepare(options(plain, root, stages=("mix",), shard_items=1024))
    [path] = (root / "pairs").glob("latents-*/*.safetensors")
    tensors = load_file(path)
    counts = tensors["first"].diff().tolist()
    assert counts == [1] * 8 + [0]
    for number, name in enumerate(sorted(name for name in tensors if name.startswith("values."))):
        assert len(tensors[name]) == int((tensors["group"] == number).sum())
    said = json.loads((path.parent / "set.json").read_text())
    assert (said["kind"], said["items"], said["shard_items"]) == ("latents", 9, 1024)


def test_bad_pictures_are_named_and_stay_bad(plain: dict[str, Any], pairs: Path, tmp_path: Path) -> None:
    (pairs / "3.png").write_bytes((pairs / "3.png").read_bytes()[:-300])
    root = tmp_path / "out"
    results, _ = prepare(options(plain, root, kinds=("latents",)))
    assert [list(result.bad) for result in results] == [["images:4"], ["pairs:4"]]
    plain["stages"]["mix"]["data"]["max_bad_fraction"] = 0.5
    recipe = parse(reading(plain, root))
    stage = build_stage("mix", recipe.stages["mix"], recipe, start(recipe))
    for step in range(20):
        stage.data.batch(step)
    assert "truncated" in stage.data.skipped["pairs/3.png"]


STALE = [
    ({"stages": {"mix": {"data": {"size": 48}}}}, "images.size: "),
    ({"stages": {"mix": {"data": {"buckets": 1.5}}}}, "images.buckets: 2.0 there, 1.5 here"),
    ({"stages": {"mix": {"data": {"fit": "letterbox"}}}}, "images.fit: "),
    ({"stages": {"mix": {"data": {"decode": "exact"}}}}, "images.decode: "),
    ({"seed": 5}, "autoencoder: "),  # other random weights
]


@pytest.mark.parametrize(("change", "says"), STALE)
def test_what_was_made_otherwise_is_refused_by_name(
    plain: dict[str, Any], tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    root = tmp_path / "out"
    prepare(options(plain, root, kinds=("latents",)))
    recipe = parse(merged(reading(plain, root), change))
    with pytest.raises(UserError, match=f"its latents were made otherwise \\({says}") as refused:
        build_stage("mix", recipe.stages["mix"], recipe, start(recipe))
    assert "\n" not in str(refused.value)


def test_features_of_other_weights_and_of_a_trained_tower_are_refused(plain: dict[str, Any], tmp_path: Path) -> None:
    root = tmp_path / "out"
    del plain["stages"]["mix"]["data"]["sources"]["pairs"]
    prepare(options(plain, root, kinds=("features",)))
    recipe = parse(reading(plain, root))
    system: Any = start(recipe)
    with torch.no_grad():
        next(system.backbone.named_parts()["vision"].parameters()).add_(1)
    with pytest.raises(UserError, match=r"its features were made otherwise \(vision: "):
        build_stage("mix", recipe.stages["mix"], recipe, system)
    trained = merged(reading(plain, root), {"stages": {"mix": {"train": ["queries", "vision"]}}})
    recipe = parse(trained)
    with pytest.raises(UserError, match="the recipe trains 'vision' here or in an earlier stage"):
        build_stage("mix", recipe.stages["mix"], recipe, start(recipe))


def test_changed_pictures_are_refused_and_made_anew(
    plain: dict[str, Any], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    del plain["stages"]["mix"]["data"]["sources"]["images"]
    prepare(options(plain, root))
    read = reading(plain, root)
    Image.new("RGB", (40, 40), "red").save(pairs / "0.png")
    with pytest.raises(UserError, match="pairs has changed since its sizes were made; run diptych prepare again"):
        losses(read)
    for folder in (root / "pairs").glob("sizes-*"):
        shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"pairs/0.png: its images have changed since latents of them were made"):
        losses(read, steps=20)
    # Made anew is only what changed.
    encoded: list[int] = []
    work = Work(options(plain, root))
    encode = work.jobs[1].maker.system.autoencoder.encode  # type: ignore[attr-defined]
    monkeypatch.setattr(
        type(work.jobs[1].maker.system.autoencoder),  # type: ignore[attr-defined]
        "encode",
        lambda self, images: (encoded.append(len(images)), encode(images))[1],
    )
    prepare(options(plain, root))
    assert sum(encoded) == 1
    assert_equal(losses(read), losses(plain))


def test_copied_data_need_no_new_latents(plain: dict[str, Any], pairs: Path, tmp_path: Path) -> None:
    root, copy = tmp_path / "out", tmp_path / "copy"
    prepare(options(plain, root, kinds=("latents",)))
    wanted = losses(plain)
    pairs.rename(copy)
    moved = reading(plain, root)
    for source in moved["stages"]["mix"]["data"]["sources"].values():
        source["path"] = str(copy)
    assert_equal(losses(moved), wanted)


def test_shards_that_are_missing_are_counted(plain: dict[str, Any], tmp_path: Path) -> None:
    root = tmp_path / "out"
    prepare(options(plain, root))
    next((root / "pairs").glob("latents-*/00001.safetensors")).unlink()
    recipe = parse(reading(plain, root))
    with pytest.raises(UserError, match="1 of 3 shards are missing; run diptych prepare again, which goes on"):
        build_stage("mix", recipe.stages["mix"], recipe, start(recipe))


def test_killed_anywhere_it_goes_on(plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, root = tmp_path / "whole", tmp_path / "out"
    prepare(options(plain, whole))
    write, written = job.write_shard, 0

    def write_or_die(*given: Any) -> None:
        nonlocal written
        written += 1
        if written % 3 == 0:
            raise KeyboardInterrupt
        write(*given)

    monkeypatch.setattr(job, "write_shard", write_or_die)
    runs, done = 0, False
    while not done:
        runs += 1
        try:
            prepare(options(plain, root))
            done = True
        except KeyboardInterrupt:
            continue
    assert (runs, written) == (6, 17)  # 12 shards, and five that were begun and not written
    assert contents(root) == contents(whole)


@pytest.mark.slow
def test_sigkill_anywhere_loses_and_repeats_nothing(plain: dict[str, Any], tmp_path: Path) -> None:
    """Three processes, each killed at another place, and one that ends what they began. Mutants: a shard that is cut is
    taken for whole; a shard that is there is made again."""
    whole, root = tmp_path / "whole", tmp_path / "out"
    plain["system"]["autoencoder"] = {"kind": "pixel"}
    given: dict[str, Any] = {"recipe": plain, "kinds": ("latents", "sizes"), "shard_items": 2, "batch_size": 2}
    prepare(Options(**given, output=str(whole)))
    there: dict[Path, tuple[int, int]] = {}
    for place, shard, done in (("half", 3, 2), ("made", 2, 3), ("after", 4, 7)):
        process = warm.start(prepare_and_die, {**given, "output": str(root)}, place, shard, output=tmp_path / "said")
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "said").read_text()
        shards = [path for path in root.rglob("*.safetensors") if not path.parent.name.startswith(".")]
        assert len(shards) == done, place
        now = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards}
        assert there.items() <= now.items(), f"{place}: made again"
        there = now
    assert list(root.rglob("*.partial")), "nothing was left half written"
    results, _ = prepare(Options(**given, output=str(root)))
    assert sum(result.there for result in results) == 7
    assert contents(root) == contents(whole)
    assert not list(root.rglob("*.partial"))
    assert all((path.stat().st_ino, path.stat().st_mtime_ns) == stamp for path, stamp in there.items())


@pytest.mark.parametrize("name", ["../up", "/up", "a/../../up"])
def test_nothing_is_written_outside_the_output(plain: dict[str, Any], tmp_path: Path, name: str) -> None:
    """Mutant: a source's name taken for a path."""
    sources = plain["stages"]["mix"]["data"]["sources"]
    plain["stages"]["mix"]["data"]["sources"] = {name: sources["images"]}
    inside = tmp_path / "outside" / "inside"
    inside.mkdir(parents=True)
    prepare(options(plain, inside))
    assert [path.name for path in inside.parent.iterdir()] == ["inside"]
    (made,) = inside.iterdir()
    assert any(made.rglob("*.safetensors"))
    assert not Path("/up").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "ray"])
def test_processes_share_the_work(
    plain: dict[str, Any], tmp_path: Path, launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    alone, together, said = tmp_path / "alone", tmp_path / "together", tmp_path / "said"
    prepare(options(plain, alone, shard_items=1, kinds=("latents", "features")))
    recipe = tmp_path / "r.yaml"
    recipe.write_text("# A recipe.\n# not run\n" + yaml.safe_dump(plain))
    words = ("prepare", str(recipe), "--output", str(together), "--shard-items", "1", "--batch-size", "2")
    words += ("--what", "latents", "features")
    if launcher == "torchrun":
        warm.group(warm.enter, words, output=said)
        told = "".join(file.read_text() for file in tmp_path.glob("said.*"))
    else:
        command = [sys.executable, "-m", "diptych", *words, "--ray", "2"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        told = ran.stdout
    made = [int(count) for count in re.findall(r"items made in (\d+) shards", told)]
    assert sum(made) == 27  # each shard by one of the two
    assert contents(together) == contents(alone)


def scorer(name: str, channel: int, captions: bool = False) -> ImageScorer:
    """The mean of a colour, in 0..1, as a model; with captions only where the caption is of this length."""

    def score(images: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([np.asarray(image)[..., channel].mean() / 255 for image in images], dtype=torch.float32)

    return ImageScorer(name, f"models/{name}", torch.nn.Linear(1, 1), score, captions)


def test_filters_of_hieraquery_read_prepared_scores(
    plain: dict[str, Any], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red is the watermark score (at most 0.5), green that of CLIP (at least 0.45); shapes up to 2.5 to 1."""
    colours = [(0, 200, 0), (255, 200, 0), (0, 10, 0), (127, 115, 0), (128, 115, 0), (127, 114, 0)]
    for number, (height, width) in enumerate(SHAPES):
        colour = colours[number] if number < len(colours) else (0, 255, 0)
        Image.new("RGB", (width, height), colour).save(pairs / f"{number}.png")
    (pairs / "6.png").write_bytes(b"no picture")
    monkeypatch.setattr(Work, "_scorers", lambda self: [scorer("watermark", 0), scorer("clip", 1, captions=True)])
    root = tmp_path / "scores"
    for name in ("pairs", "images"):
        plain["stages"]["mix"]["data"]["sources"][name] |= {
            "prepared": str(root),
            "filters": {"max_aspect": 2.5, "max_watermark": 0.5, "min_clip": 0.45},
        }
    results, _ = prepare(options(plain, root, kinds=(), output=None))
    assert sorted((result.label, result.items) for result in results) == [("images: clip", 8), ("images: watermark", 8)]
    recipe = parse(plain)
    stage = build_stage("mix", recipe.stages["mix"], recipe, start(recipe))
    for source, task in zip(stage.data.sources, ("image", "text_to_image"), strict=True):
        samples = [source.load(index, ItemDraws(0), (32, 32)) for index in range(len(source))]
        assert [sample.id.rpartition("/")[2] for sample in samples] == ["0.png", "3.png", "7.png"]
        assert {sample.task for sample in samples} == {task}
        assert {bool(sample.text) for sample in samples} == {task == "text_to_image"}
        assert list(source.dropped.values()) == [
            "watermark score 1 above 0.5",
            "clip score 0.0392157 below 0.45",
            "watermark score 0.501961 above 0.5",
            "clip score 0.447059 below 0.45",
            "no watermark score (its image could not be read)",
            "aspect ratio 5.00 above 2.5",
        ]


def test_scores_of_two_models_are_refused(
    plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        made = scorer("watermark", 0)
        monkeypatch.setattr(Work, "_scorers", lambda self, made=made: [made])
        prepare(options(plain, tmp_path, kinds=()))
    recipe = parse(reading(plain, tmp_path))
    with pytest.raises(UserError, match=r"holds watermark twice \(models/watermark and models/watermark\); remove"):
        build_stage("mix", recipe.stages["mix"], recipe, start(recipe))


def test_recipes_of_hieraquery_filter_by_prepared_scores() -> None:
    for name in ("hieraquery/sd3", "hieraquery/sana"):
        recipe, _ = load(name)
        sources = [source for stage in recipe.stages.values() for source in stage.data.sources.values()]
        filtered = [source for source in sources if source.filters is not None]
        assert [source.task for source in filtered] == ["text_to_image", "image"]
        for source in filtered:
            assert source.prepared == "data/hieraquery/pairs.prepared"
            assert source.filters == Filters(max_aspect=2.5, max_watermark=0.5, min_clip=0.45)


def contents(root: Path) -> dict[str, bytes]:
    """Every shard by its place."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.safetensors")}


def merged(plain: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`plain` with the values of `change` in it."""
    for name, value in change.items():
        plain[name] = merged(plain.get(name, {}), value) if isinstance(value, dict) else value
    return plain
