"""What `check` says of a recipe, against counts made by other means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from PIL import Image

from diptych.core.errors import UserError
from diptych.recipes.build import build_system
from diptych.recipes.check import PartReport, SystemReport, check_data, check_system
from diptych.recipes.recipe import SourceSpec, load, parse
from diptych.recipes.train import run_folder


def test_parts_origins_and_memory(tiny_plain: dict[str, Any], tiny_mllm: Path) -> None:
    tiny_plain["stages"]["mix"] |= {"ema_decay": 0.99, "micro_batch_size": 2}
    recipe = parse(tiny_plain)
    found = check_system(recipe)
    system = build_system(recipe.system)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in system.named_parts().items()}
    assert {part.name: part.parameters for part in found.parts} == sizes
    origins = {part.name: part.weights for part in found.parts}
    assert origins["llm"] == origins["vision"] == str(tiny_mllm)
    assert origins["decoder"] == origins["queries"] == "random"
    trained = {part.name: part.trained for part in found.parts if part.trained}
    assert trained == {"queries": {"mix": sizes["queries"]}, "decoder": {"mix": sizes["decoder"]}}

    (stage,) = found.stages
    learned = sizes["queries"] + sizes["decoder"]
    assert (stage.trained, stage.seen) == (learned, 12)
    memory = stage.memory
    assert memory.weights == 4 * sum(sizes.values()) + sum(buffer.nbytes for buffer in system.buffers())
    assert (memory.gradients, memory.ema) == (4 * learned, 4 * learned)
    assert memory.optimizer == pytest.approx(8 * learned, rel=1e-3)  # and a counter of steps for each parameter
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.ema + (memory.activations or 0)

    tiny_plain["stages"]["mix"]["micro_batch_size"] = 4
    twice = check_system(parse(tiny_plain)).stages[0].memory
    assert memory.activations is not None
    assert twice.activations is not None
    assert 1.5 * memory.activations < twice.activations < 2.5 * memory.activations
    tiny_plain["start"] = "toy/iomm"
    assert {part.weights for part in check_system(parse(tiny_plain)).parts} == {"toy/iomm"}


def test_a_sharded_process_has_its_share_and_what_is_gathered(tiny_plain: dict[str, Any]) -> None:
    tiny_plain["stages"]["mix"] |= {"ema_decay": 0.99}
    tiny_plain["run"] = {**tiny_plain.get("run", {}), "strategy": "fsdp", "sample_every": 0}
    whole = check_system(parse(tiny_plain)).stages[0].memory
    shared = check_system(parse(tiny_plain), processes=4).stages[0].memory
    assert whole.gathered == 0 < shared.gathered
    for name in ("weights", "gradients", "optimizer", "ema"):
        share = getattr(whole, name) / 4
        assert share <= getattr(shared, name) < 1.25 * share, "small tensors do not divide evenly"
    assert not dist.is_initialized()

    tiny_plain["run"]["strategy"] = "auto"
    copied = check_system(parse(tiny_plain), processes=4).stages[0].memory
    assert (copied.weights, copied.buckets) == (whole.weights, whole.gradients), "DDP sends copies of the gradients"


@pytest.mark.parametrize(
    ("batch", "processes", "advice"),
    [
        (4, 3, "set it to 3 or 6, or start 2"),
        (4, 8, "set it to 8, or start 4"),
    ],
)
def test_a_batch_that_does_not_divide(tiny_plain: dict[str, Any], batch: int, processes: int, advice: str) -> None:
    tiny_plain["stages"]["mix"]["batch_size"] = batch
    message = f"stages.mix.batch_size: {batch} does not divide among {processes} processes; {advice}"
    with pytest.raises(UserError, match=message):
        check_system(parse(tiny_plain), processes=processes)


@pytest.mark.slow
def test_a_recipe_of_a_published_model_without_its_weights() -> None:
    """Of full width, with fewer blocks in the decoder: a trace takes ten milliseconds for each operation."""
    recipe, _ = load("iomm/b_pretrain_image", ["system.decoder.config.double=1", "system.decoder.config.single=1"])
    found = check_system(recipe)
    sizes = {part.name: part for part in found.parts}
    assert sizes["adapter"].parameters == pytest.approx(28.7e6, rel=0.02)
    assert sizes["llm"].parameters + sizes["vision"].parameters > 1.8e9
    assert sizes["llm"].trained == {}
    memory = found.stages[0].memory
    assert memory.weights > 2 * 1.8e9
    assert memory.activations is not None
    assert memory.activations > 10**9
    assert any("megalith" in fault for fault in check_data(recipe, found, "pretrain").faults)


def test_data_time_and_sheet(tiny_plain: dict[str, Any]) -> None:
    recipe = parse(tiny_plain)
    told: list[tuple[str, int, int]] = []
    data = check_data(recipe, check_system(recipe), "mix", limit=5, progress=lambda *x: told.append(x))
    assert data.report.usable == 10
    assert told[-1] == ("mix/pairs", 5, 5)
    assert data.seconds is not None
    assert data.seconds > 0
    assert min(data.sheet.size) > 100


def test_where_runs_go(tmp_path: Path) -> None:
    assert run_folder("toy/quickstart") == Path("runs/toy-quickstart")
    assert run_folder("toy/quickstart", tmp_path) == tmp_path
    (tmp_path / "mine.yaml").write_text("seed: 1")
    assert run_folder(str(tmp_path / "mine.yaml")) == Path("runs/mine")


@pytest.mark.parametrize("name", ["iomm/b_pretrain_pair", "bagel/finetune"])
def test_data_of_a_large_model_is_read_without_its_tokenizer(name: str, tmp_path: Path) -> None:
    """Its files are not there, so no sample can be prepared; the pictures and captions are looked at all the same."""
    for number in range(4):
        Image.new("RGB", (300, 300), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a cat")
    (tmp_path / "3.png").write_bytes(b"no picture")
    recipe, _ = load(name)
    stage = next(iter(recipe.stages))
    source = SourceSpec(kind="folder", task="text_to_image", path=str(tmp_path))
    spec = recipe.stages[stage]
    data = replace(spec.data, sources={"mine": source}, max_bad_fraction=0.5)
    recipe = replace(recipe, stages={stage: replace(spec, data=data)})
    system = build_system(recipe.system, meta=True)
    parts = [
        PartReport(name=part, parameters=sum(p.numel() for p in module.parameters()), trained={}, weights="-")
        for part, module in system.named_parts().items()
    ]
    found = check_data(recipe, SystemReport(parts=parts, stages=[]), stage)
    assert found.faults == []
    assert [(report.read, len(report.bad)) for report in found.report.sources] == [(4, 1)]
    assert any("not looked at: its tokenizer" in line for line in found.lines)
    assert found.seconds is None
