"""Whether a card holds a step, which settings near it do, and how long a run takes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diptych.cli.main import main
from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.sample import Task
from diptych.inference.placement import blocks
from diptych.recipes.build import build_system
from diptych.recipes.cards import card_named, days
from diptych.recipes.check import check_system
from diptych.recipes.load import start
from diptych.recipes.nearest import Search, nearest
from diptych.recipes.recipe import Recipe, parse
from diptych.recipes.stand_in import lend_tokenizer, stand_in_samples
from diptych.training.loop import freeze

LORA = {"rank": 2, "alpha": 2, "targets": ["qkv"]}


@pytest.fixture
def adapted(tiny_plain: dict[str, Any]) -> dict[str, Any]:
    """Adapters on the tiny decoder."""
    tiny_plain["system"]["decoder"]["lora"] = LORA
    tiny_plain["stages"]["mix"]["train"] = ["lora"]
    return tiny_plain


def test_days_by_hand() -> None:
    # 6 FLOP for each of 10^9 weights and 10^12 tokens, on 8 cards of 10^15 FLOP/s at a half: 1.5 * 10^6 seconds.
    assert days(6e21, 8, 1e15, 0.5) == pytest.approx(1.5e6 / 86400)
    for share in (0.0, 1.1, -1.0):
        with pytest.raises(UserError, match="--mfu must be above 0 and at most 1"):
            days(1.0, 1, 1.0, share)


def test_cards_by_name_and_by_memory() -> None:
    h100 = card_named("H100")
    assert (h100.memory, h100.peak("bf16")) == (80 * 10**9, 989.4e12)
    assert h100.room < h100.memory, "the driver takes its part"
    assert h100.peak("fp32") != h100.peak("bf16")
    plain = card_named("24GB")
    assert (plain.memory, plain.peak("bf16")) == (24 * 10**9, None)
    assert card_named("24GB", peak=150.0).peak("bf16") == 150e12
    with pytest.raises(UserError, match="Did you mean 'h100'"):
        card_named("h10")
    with pytest.raises(UserError, match="write a memory as 24GB"):
        card_named("24 apples")
    for peak in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--peak must be above 0"):
            card_named("24GB", peak=peak)


def test_the_work_of_a_step_is_what_torch_counts_of_a_real_one(tiny_plain: dict[str, Any]) -> None:
    tiny_plain["stages"]["mix"]["batch_size"] = 2
    recipe = parse(tiny_plain)
    spec = recipe.stages["mix"]
    work = check_system(recipe).stages[0].work
    assert work is not None
    assert work.tokens == 16, "4 x 4 latent tokens"

    system = build_system(recipe.system)
    lend_tokenizer(system)
    freeze(system, spec.train)
    preparer = system.preparer()

    def counted(*tasks: Task) -> float:
        samples = stand_in_samples(spec, dict.fromkeys(tasks, 1))
        batch = preparer.collate([preparer.prepare(x, Draws([row], "cpu")) for row, x in enumerate(samples)])
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it knows no attention of CPUs
            terms = system.losses(batch, Draws(list(range(len(tasks))), "cpu"))
            torch.stack([x.sum() for x in terms.values()]).sum().backward()
        return counter.get_total_flops()

    assert work.flops == pytest.approx(counted("image", "text_to_image") / 2, rel=0.01)

    tiny_plain["run"]["checkpointing"] = ["decoder"]
    again = check_system(parse(tiny_plain)).stages[0].work
    assert again is not None
    assert again.flops == pytest.approx(work.flops), "what is computed again does not count"
    tiny_plain["stages"]["mix"] |= {"batch_size": 4, "micro_batch_size": 1}
    single = check_system(parse(tiny_plain)).stages[0].work
    assert single is not None
    assert single.flops == pytest.approx((counted("image") + counted("text_to_image")) / 2, rel=0.01)


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_quantised_weights_count_in_their_format(adapted: dict[str, Any], format: Any) -> None:
    pytest.importorskip("bitsandbytes")
    whole = check_system(parse(adapted))
    plain = whole.stages[0].memory
    adapted["system"]["decoder"]["quantize"] = format
    report = check_system(parse(adapted))
    memory = report.stages[0].memory
    assert [part.parameters for part in report.parts] == [part.parameters for part in whole.parts]
    system = start(parse(adapted), quantized=True)
    real = sum(tensor.nbytes for tensor in (*system.parameters(), *system.buffers()))
    for block in blocks(system):
        for layer in block.modules():
            weight: Any = getattr(layer, "weight", None)
            if hasattr(weight, "quant_state"):
                real += weight.quant_state.absmax.nbytes + weight.quant_state.state2.absmax.nbytes
            elif getattr(weight, "SCB", None) is not None:
                real += weight.SCB.nbytes
    assert memory.weights == pytest.approx(real, rel=0.02)
    assert memory.weights < plain.weights
    assert memory.gradients == plain.gradients
    assert memory.activations is not None


def test_adapters_alone_are_sharded(adapted: dict[str, Any]) -> None:
    adapted["run"]["strategy"] = "fsdp"
    memory = check_system(parse(adapted), processes=2).stages[0].memory
    assert memory.activations is not None
    assert memory.gathered > 0


def test_what_changes_no_result_is_tried_first(tiny_plain: dict[str, Any]) -> None:
    tiny_plain["stages"]["mix"]["batch_size"] = 16
    recipe = parse(tiny_plain)
    whole = check_system(recipe).stages[0].memory.total
    other = nearest(recipe, "mix", int(0.8 * whole))
    assert other is not None
    assert other.fits
    assert other.needed <= 0.8 * whole
    keys = {change.split("=")[0] for change in other.changes}
    assert keys <= {"run.checkpointing", "stages.mix.micro_batch_size"}
    tiny_plain["run"]["checkpointing"] = ["llm", "vision", "decoder"]
    for change in other.changes:
        key, _, value = change.partition("=")
        if key == "stages.mix.micro_batch_size":
            tiny_plain["stages"]["mix"]["micro_batch_size"] = int(value)
    assert check_system(parse(tiny_plain)).stages[0].memory.total == pytest.approx(other.needed, rel=0.01)


def test_what_is_held_throughout_is_counted_and_not_traced(tiny_plain: dict[str, Any]) -> None:
    """Mutants: another factor in `Search.holds`, a trace of what cannot fit, the first size instead of the largest."""
    tiny_plain["stages"]["mix"] |= {"batch_size": 60, "micro_batch_size": 4, "ema_decay": 0.9}
    tiny_plain["run"] |= {"sample_every": 1, "checkpointing": ["decoder"]}
    for changes in ({}, {"frozen_weights": "bfloat16"}):
        tiny_plain["run"] |= {**changes, "precision": "bf16"}
        memory = check_system(parse(tiny_plain)).stages[0].memory
        search = Search(parse(tiny_plain), "mix", 0, 1)
        held = memory.weights + memory.gradients + memory.optimizer + memory.ema
        assert search.holds([]) == pytest.approx(held, rel=0.01)
        assert search.holds([]) <= held
    shards = search.lasting()[-4]
    assert shards.words == ("--processes 8", "run.strategy=fsdp", "run.sample_every=0", "stages.mix.batch_size=64")
    assert search.holds([shards]) == pytest.approx(search.holds([]) / 8, rel=0.01)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """In place of traces: a step takes what it holds, and 0.1 MB a sample of a pass, half of that recomputed."""
    traces = {"count": 0}

    def check(recipe: Recipe, *, processes: int) -> Any:
        traces["count"] += 1
        search = Search(recipe, "mix", 0, processes)
        spec = recipe.stages["mix"]
        samples = min(spec.micro_batch_size or 10**9, spec.batch_size // processes)
        total = search.holds([]) + 10**5 * samples // (2 if "decoder" in recipe.run.checkpointing else 1)
        return SimpleNamespace(stages=[SimpleNamespace(memory=SimpleNamespace(total=total))])

    monkeypatch.setattr("diptych.recipes.nearest.check_system", check)
    return traces


def test_what_cannot_fit_is_not_traced(tiny_plain: dict[str, Any], counted: dict[str, int]) -> None:
    tiny_plain["stages"]["mix"] |= {"batch_size": 60, "micro_batch_size": 1}
    tiny_plain["run"]["checkpointing"] = ["decoder"]
    recipe = parse(tiny_plain)
    held = Search(recipe, "mix", 0, 1).holds([])
    found = nearest(recipe, "mix", 10**5 // 2 + held // 2)  # the sample alone fits; the weights do so in shards
    assert found is not None
    assert found.fits
    assert found.words() == "--processes 8 --set run.strategy=fsdp stages.mix.batch_size=64"
    assert counted["count"] == 1


@pytest.mark.parametrize(("samples", "changes"), [(33, "decoder"), (32, "decoder"), (9, "=16"), (8, "=16"), (1, "=2")])
def test_of_smaller_passes_the_largest_that_fits_is_found(
    samples: int, changes: str, tiny_plain: dict[str, Any], counted: dict[str, int]
) -> None:
    """A pass takes 64 samples, 32 where its activations are computed again, and half as many at a time."""
    tiny_plain["stages"]["mix"]["batch_size"] = 64
    recipe = parse(tiny_plain)
    found = nearest(recipe, "mix", Search(recipe, "mix", 0, 1).holds([]) + 10**5 * samples)
    assert found is not None
    assert found.fits
    assert changes in found.words()
    assert counted["count"] <= 6, "of eight settings"


@pytest.mark.slow
def test_a_card_that_nothing_fits_names_the_least(
    adapted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Search, "lasting", lambda search: [])
    file, out = tmp_path / "r.yaml", str(tmp_path / "sheets")
    file.write_text(yaml.safe_dump(adapted))
    options = ["check", str(file), "--preview", "-o", out]
    assert main([*options, "--card", "0.7001GB", "--peak", "2", "--mfu", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "16 a sample" in said
    assert "on one 0.7001GB at 50% of 2 TFLOP/s" in said
    assert "do not fit 0.7001GB: " in said
    assert "nothing that was tried fits; the least is with --set" in said
    assert main([*options, "--card", "h100"]) == 0
    said = capsys.readouterr().out
    assert "on one h100 at 40% of 67 TFLOP/s" in said
    assert "warning" not in said
    assert main([*options, "--card", "0.5GB"]) == 0
    said = capsys.readouterr().out
    assert "are missing, and the driver alone takes more" in said
    assert "it takes" not in said


def test_no_word_is_said_twice(tiny_plain: dict[str, Any], counted: dict[str, int]) -> None:
    recipe = parse(tiny_plain)
    least = nearest(recipe, "mix", 1)
    assert least is not None
    assert not least.fits
    assert {"run.precision=bf16", "run.frozen_weights=bfloat16"} <= set(least.changes)
    assert len(set(least.changes)) == len(least.changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mfu", "0.5"], "--mfu has no effect without --card"),
        (["--peak", "10"], "--peak has no effect without --card"),
        (["--card", "h100", "--mfu", "2"], "--mfu must be above 0 and at most 1, not 2.0"),
        (["--card", "24GB", "--mfu", "0.5"], "the peak of a card of 24GB is not known; give --peak"),
        (["--card", "banana"], "unknown card 'banana'"),
    ],
)
def test_options_of_cards_that_do_not_go_together(
    tiny_recipe: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(tiny_recipe), *options]) == 2
    assert message in capsys.readouterr().err
