"""States of the MLLM that `diptych prepare` keeps: training from them equals training without, and stale ones are
refused in one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.data import loader
from diptych.parts.backbones.internvl import InternVL
from diptych.recipes.check import check_data, check_system
from diptych.recipes.load import stage_settings
from diptych.recipes.plain import load_plain
from diptych.recipes.prepare import Options, prepare
from diptych.recipes.prepared import refuse_mixed_states
from diptych.recipes.recipe import parse
from diptych.recipes.run import build_stage, train_recipe
from diptych.recipes.start import start_weights
from diptych.training import loop

TEXTS = (["a red circle", "a circle left of a blue square"], ["three green crosses"], "a pink square")
RAW = {"cfg_dropout": 0.3, "cfg_dropout_text": 0.2, "condition": "all", "conditioner": {"kind": "raw"}}
SYSTEMS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "iomm": ("toy/iomm_finetune_mix", RAW, ("text_to_image", "edit", "image")),
    "iomm, frozen adapter": ("toy/iomm_finetune_mix", {"cfg_dropout": 0.3}, ("text_to_image", "image")),
    "qwen-image": ("toy/iomm_finetune_mix", {**RAW, "prompt_skip": 2, "max_states": 9}, ("text_to_image",)),
    "omnigen2": ("toy/omnigen2", {"cfg_dropout": 0.5}, ("text_to_image", "edit")),
    "omnigen2, images in": ("toy/omnigen2", {"cfg_dropout": 0.5, "mllm_images": "kept"}, ("edit",)),
    "ovis_u1": ("toy/ovis_u1", {"cfg_dropout_text": 0.3, "cfg_dropout_all": 0.3}, ("text_to_image", "edit")),
    "ovis_u1, blank": ("toy/ovis_u1", {"blank": True, "cfg_dropout_all": 0.3}, ("text_to_image",)),
    "hieraquery": ("toy/hieraquery", {"cfg_dropout": 0.3}, ("text_to_image", "edit")),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs with one caption and several, and edits."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    for name in ("0", "1", "2", "before"):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    rows = [{"image": f"{number}.png", "text": text} for number, text in enumerate(TEXTS)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    edits = [{"image": f"{n}.png", "source": "before.png", "instruction": f"make it {c}"} for n, c in enumerate("ab")]
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, edits)))
    (folder / "images.jsonl").write_text("\n".join(json.dumps({"image": f"{n}.png"}) for n in range(3)))
    return folder


def recipe_of(name: str, files: Path) -> dict[str, Any]:
    """A toy recipe in one stage that trains the decoder on these files."""
    shipped, settings, tasks = SYSTEMS[name]
    plain = load_plain(shipped)
    plain["system"] |= settings
    lists = {"text_to_image": "pairs", "edit": "edits", "image": "images"}
    sources = {task: {"kind": "jsonl", "task": task, "path": str(files / f"{lists[task]}.jsonl")} for task in tasks}
    data = {"size": 32, "sources": sources}
    stage = {"train": ["decoder"], "steps": 4, "batch_size": 4, "data": data}
    plain |= {"stages": {"draw": stage}, "run": {"device": "cpu"}, "start": None}
    if "mask_ratio" in plain["system"]:
        plain["system"]["mask_ratio"] = 0.0
    return json.loads(json.dumps(plain))


def options(plain: dict[str, Any], root: Path, **given: Any) -> Options:
    return Options(**{"recipe": plain, "output": str(root), "kinds": ("states",), "shard_items": 2, **given})


def reading(plain: dict[str, Any], root: Path) -> dict[str, Any]:
    """The recipe with its sources' prepared data below `root`."""
    read = json.loads(json.dumps(plain))
    for stage in read["stages"].values():
        for name, source in stage["data"]["sources"].items():
            source["prepared"] = str(root / name)
    return read


def start_of(plain: dict[str, Any]) -> Any:
    """The system that a recipe starts from. What stands behind the states gets random weights: some start at zero, and
    the loss would not depend on the condition."""
    system: Any = start_weights(parse(plain))
    torch.manual_seed(0)
    for part in (system.decoder, system.connector, *filter(None, (system.refiner, system.pooled))):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return system


def stage_of(plain: dict[str, Any], system: Any, number: int = 0) -> loop.Stage:
    recipe = parse(plain)
    stage_settings(system, list(recipe.stages.values()))(number)
    name = list(recipe.stages)[number]
    return build_stage(name, recipe.stages[name], recipe, system)


def losses(plain: dict[str, Any], system: Any, steps: int = 6) -> list[dict[str, list[float]]]:
    """The losses of a recipe's first steps, without learning."""
    stage = stage_of(plain, system)
    rows: list[dict[str, list[float]]] = []
    half = plain["run"].get("precision") == "bf16"
    for step in loader.steps(stage.data, system.preparer(), 0, steps):
        for part in step.passes:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                terms = system.losses(part.batch, Draws(list(part.keys)))
            rows.append({name: values.tolist() for name, values in terms.items()})
    return rows


def assert_equal(found: list[dict[str, list[float]]], wanted: list[dict[str, list[float]]], within: float) -> None:
    """To `within`, and of losses above 1 to this share of them."""
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    for mine, theirs in zip(found, wanted, strict=True):
        for name, values in mine.items():
            assert values == pytest.approx(theirs[name], rel=within, abs=within), name


def without_mllm(system: Any) -> Any:
    """The same, whose MLLM cannot be asked."""
    system.backbone.run = system.backbone.vision_features = None
    return system


@pytest.mark.parametrize("name", SYSTEMS)
def test_training_from_states_equals_training_without(name: str, files: Path, tmp_path: Path) -> None:
    plain = recipe_of(name, files)
    system = start_of(plain)
    wanted = losses(plain, system)
    prepare(options(plain, tmp_path))
    if name == "hieraquery":  # its alignment looks at the target
        system.backbone.run = None
    else:
        without_mllm(system)
    assert_equal(losses(reading(plain, tmp_path), system), wanted, 1e-6)


def test_half_precision(files: Path, tmp_path: Path) -> None:
    """In bfloat16 the states are those that autocast gives. A batch of other lengths rounds otherwise, so that a loss
    differs by some thousandths of it, as it does between two batches."""
    plain = recipe_of("iomm", files)
    plain["run"]["precision"] = "bf16"
    system = start_of(plain)
    wanted = losses(plain, system)
    prepare(options(plain, tmp_path, dtype="bfloat16"))
    assert_equal(losses(reading(plain, tmp_path), without_mllm(system)), wanted, 5e-3)


# What is kept, and what is refused; on the tiny system, whose decoder alone learns.


@pytest.fixture
def plain(tiny_plain: dict[str, Any], files: Path, tmp_path: Path) -> dict[str, Any]:
    pairs = tmp_path / "data"
    shutil.copytree(files, pairs)
    sources = {"pairs": {"kind": "jsonl", "task": "text_to_image", "path": str(pairs / "pairs.jsonl")}}
    tiny_plain["system"] |= {"cfg_dropout": 0.3, "conditioner": {"kind": "raw"}}
    tiny_plain["stages"]["mix"] |= {"train": ["decoder"], "data": {"size": 32, "sources": sources}}
    return tiny_plain


def test_every_text_and_the_dropped_request_are_kept_once(plain: dict[str, Any], tmp_path: Path) -> None:
    root = tmp_path / "out"
    results, _ = prepare(options(plain, root, shard_items=8))
    assert [(result.label, result.items) for result in results] == [("pairs: states", 3)]
    [path] = root.rglob("*.safetensors")
    tensors = load_file(path)
    assert tensors["first"].diff().tolist() == [4, 3, 3]  # digests, each text, and the request without one
    states = sum(len(values) for name, values in tensors.items() if name.startswith("values.") and values.ndim == 3)
    assert states == 5  # four texts and the one that all share
    said = json.loads((path.parent / "set.json").read_text())
    assert said["made_from"]["dropped"] == ["text_and_images"]


def test_states_and_requests_that_are_read_share_a_batch(plain: dict[str, Any], tmp_path: Path) -> None:
    """The same pairs twice, of which one source has states."""
    root = tmp_path / "out"
    sources = plain["stages"]["mix"]["data"]["sources"]
    sources["others"] = dict(sources["pairs"])
    system = start_of(plain)
    wanted = losses(plain, system, steps=3)
    prepare(options(plain, root))
    read = reading(plain, root)
    del read["stages"]["mix"]["data"]["sources"]["others"]["prepared"]
    assert_equal(losses(read, system, steps=3), wanted, 1e-6)


def test_a_trigger_and_lines_are_among_the_texts(plain: dict[str, Any], tmp_path: Path) -> None:
    root = tmp_path / "out"
    source = plain["stages"]["mix"]["data"]["sources"]["pairs"]
    source["vary"] = {"trigger": "sks", "lines": True, "caption_dropout": 0.3}
    path = Path(source["path"])
    path.write_text(path.read_text().replace("a pink square", "a pink square\\nsks, a square"))
    system = start_of(plain)
    wanted = losses(plain, system)
    prepare(options(plain, root))
    assert_equal(losses(reading(plain, root), without_mllm(system)), wanted, 1e-6)
    source["vary"]["trigger"] = "frog"
    with pytest.raises(UserError, match=r'its states were made otherwise \(vary.trigger: "sks" there, "frog" here\)'):
        stage_of(reading(plain, root), system)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"stages": {"mix": {"train": ["decoder", "llm"]}}}, "the recipe trains 'llm' of the MLLM here or in an earlier"),
    (
        {
            "system": {"conditioner": {"kind": "metaquery", "config": {"queries": 4}}},
            "stages": {"mix": {"train": ["queries"]}},
        },
        "the recipe trains 'queries' here or in an earlier stage, queries that run through the MLLM",
    ),
    (
        {"stages": {"mix": {"data": {"sources": {"pairs": {"vary": {"shuffle_tags": True}}}}}}},
        "vary.shuffle_tags gives a caption too many forms; leave it out",
    ),
    (
        {"system": {"mask_ratio": 0.75}, "stages": {"mix": {"data": {"sources": {"pairs": {"task": "image"}}}}}},
        "mask_ratio 0.75 hides other image tokens in every visit; set mask_ratio: 0",
    ),
]


@pytest.mark.parametrize(("change", "says"), REFUSED)
def test_what_changes_with_every_step_is_refused_by_its_setting(
    plain: dict[str, Any], tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    root = tmp_path / "out"
    prepare(options(plain, root))
    changed = merged(json.loads(json.dumps(plain)), change)
    if "mask_ratio" in says:  # unlabelled images have no text
        path = tmp_path / "data" / "images.jsonl"
        changed["stages"]["mix"]["data"]["sources"]["pairs"]["path"] = str(path)
    with pytest.raises(UserError, match=f"no states, since {re.escape(says)}"):
        prepare(options(changed, tmp_path / "other"))
    with pytest.raises(UserError, match=f"states were prepared, but {re.escape(says)}") as refused:
        stage_of(reading(changed, root), start_weights(parse(changed)))
    assert "\n" not in str(refused.value)


STALE: list[tuple[dict[str, Any], str]] = [
    ({"system": {"prompts": {"text_to_image": "Draw {text}"}}}, "prompts.text_to_image: "),
    ({"system": {"prompt_skip": 1}}, "settings.prompt_skip: 0 there, 1 here"),
    ({"system": {"cfg_dropout_text": 0.1}}, 'dropped: \\["text_and_images"\\] there, '),
    ({"system": {"blank": True}}, "settings.blank: false there, true here"),
    ({"run": {"precision": "bf16"}}, 'precision: "fp32" there, "bf16" here'),
    ({"run": {"frozen_weights": "bfloat16", "precision": "bf16"}}, "mllm: "),
    (
        {"system": {"conditioner": {"kind": "metaquery", "config": {"queries": 4}}}},
        "conditioner: ",
    ),
]


@pytest.mark.parametrize(("change", "says"), STALE)
def test_stale_states_are_refused_in_one_line(
    plain: dict[str, Any], tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    root = tmp_path / "out"
    prepare(options(plain, root))
    changed = merged(reading(plain, root), change)
    with pytest.raises(UserError, match=f"its states were made otherwise \\({says}") as refused:
        stage_of(changed, start_weights(parse(changed)))
    assert "\n" not in str(refused.value)


def test_states_of_other_weights_and_formats_are_refused(plain: dict[str, Any], tmp_path: Path) -> None:
    root = tmp_path / "out"
    prepare(options(plain, root))
    system: Any = start_weights(parse(plain))
    next(system.backbone.parameters()).add_(1)
    with pytest.raises(UserError, match=r"its states were made otherwise \(mllm: "):
        stage_of(reading(plain, root), system)
    with pytest.raises(UserError, match="holds float32, not bfloat16; remove it, or use --dtype"):
        prepare(options(plain, root, dtype="bfloat16"))


def test_changed_captions_are_refused_and_made_anew(plain: dict[str, Any], tmp_path: Path) -> None:
    root, path = tmp_path / "out", tmp_path / "data" / "pairs.jsonl"
    prepare(options(plain, root))
    path.write_text(path.read_text().replace("three green", "two green"))
    system = start_of(plain)
    with pytest.raises(UserError, match=r"pairs:2: its images or captions have changed since states of them"):
        losses(reading(plain, root), system)
    read: list[int] = []
    run = InternVL.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InternVL, "run", lambda self, x, *a, **k: (read.append(len(x)), run(self, x, *a, **k))[1])
        prepare(options(plain, root))
    assert sum(read) == 2  # the new text, and the request without one
    wanted = losses(plain, system)
    assert_equal(losses(reading(plain, root), without_mllm(system)), wanted, 1e-6)


def test_an_earlier_stage_that_trains_the_mllm_is_looked_at(plain: dict[str, Any], tmp_path: Path) -> None:
    """States of the start are not those after that stage. Mutant: the stage's own parts alone are looked at."""
    root = tmp_path / "out"
    prepare(options(plain, root))
    stages = plain["stages"]
    plain["stages"] = {"read": {**stages["mix"], "train": ["llm"]}, "mix": stages["mix"]}
    read = reading(plain, root)
    del read["stages"]["read"]["data"]["sources"]["pairs"]["prepared"]
    with pytest.raises(UserError, match="states were prepared, but the recipe trains 'llm' of the MLLM here or in an"):
        stage_of(read, start_weights(parse(read)), 1)


def test_a_sharded_run_mixes_no_sources_with_states_and_without(plain: dict[str, Any], tmp_path: Path) -> None:
    root = tmp_path / "out"
    sources = plain["stages"]["mix"]["data"]["sources"]
    sources["others"] = dict(sources["pairs"])
    prepare(options(plain, root))
    read = reading(plain, root)
    refuse_mixed_states(parse(read).stages["mix"].data, "data.sources")
    del read["stages"]["mix"]["data"]["sources"]["others"]["prepared"]
    with pytest.raises(
        UserError, match=r"data.sources.others: of the sources of task text_to_image some have prepared"
    ):
        refuse_mixed_states(parse(read).stages["mix"].data, "data.sources")


def merged(plain: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`plain` with the values of `change` in it."""
    for name, value in change.items():
        plain[name] = merged(plain.get(name, {}), value) if isinstance(value, dict) else value
    return plain


def test_weights_of_a_half_precision_file(plain: dict[str, Any], tiny_mllm: Path, tmp_path: Path) -> None:
    """An MLLM in bfloat16, whose frozen weights stay in it: job, check and run have the same ones. Mutant: the job, or
    the check, reads them as float32."""
    InternVL.from_pretrained(tiny_mllm).save_pretrained(tmp_path / "half", torch.bfloat16)
    plain["system"]["backbone"]["weights"] = str(tmp_path / "half")
    plain["run"] |= {"precision": "bf16"}
    plain["stages"]["mix"]["steps"] = 1
    root = tmp_path / "out"
    prepare(options(plain, root, kinds=("latents", "states")))
    read = reading(plain, root)
    recipe = parse(read)
    assert check_data(recipe, check_system(recipe), "mix").faults == []
    assert train_recipe(recipe, read, tmp_path / "run")
