"""A model into a given memory: what is chosen, that it holds, and what is said."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import diptych
from diptych.cli.main import main
from diptych.core.errors import UserError
from diptych.inference.engine import Engine
from diptych.inference.placement import Placement, blocks, place
from diptych.recipes import fit
from diptych.recipes.fit import SLACK, amount, candidates, fitted, memory, needs, resident, working_memory
from diptych.training.memory import AllocationTracker

SYSTEMS = ["toy/iomm", "toy/ovis-u1", "toy/omnigen2", "toy/hieraquery", "toy/bagel"]


@pytest.fixture(autouse=True, scope="module")
def _traced_once() -> Iterator[None]:
    """A shipped model is traced once for the same request, however often it is loaded: a trace takes a second."""
    trace, known = fit.working_memory, dict[Any, int]()

    def once(engine: Engine, *request: Any) -> int:
        key = (engine.name, engine.sampling.size, next(engine.system.parameters()).dtype, *request)
        if key not in known:
            known[key] = trace(engine, *request)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "working_memory", once)
        yield


@functools.cache
def loaded(name: str) -> Engine:
    return diptych.load(name, device="cpu")


@pytest.mark.parametrize(
    ("text", "bytes_"), [("24GB", 24 * 10**9), ("24 gib", 24 * 2**30), ("1.5MB", 1_500_000), (7_000_000, 7_000_000)]
)
def test_amounts_of_memory(text: str | int, bytes_: int) -> None:
    assert memory(text) == bytes_


@pytest.mark.parametrize("text", ["", "24 apples", "-1GB", "0GB", "GB", "24", "800"])
def test_no_amount_of_memory(text: str) -> None:
    with pytest.raises(UserError, match=f"fit {text}: write a memory as 24GB"):
        memory(text)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, None) for name in SYSTEMS), ("toy/iomm", torch.bfloat16), ("toy/bagel", torch.bfloat16)],
)
def test_traced_working_memory_is_that_of_a_real_edit(name: str, dtype: torch.dtype | None) -> None:
    engine = diptych.load(name, device="cpu", dtype="auto" if dtype is None else "bfloat16")
    traced = working_memory(engine, dtype, 2, None)
    image = torch.zeros(3, *engine.sampling.size)
    tracker = AllocationTracker()
    for tensor in (*engine.system.parameters(), *engine.system.buffers()):
        tracker.add(tensor)
    before = tracker.now
    with tracker:
        engine.edit([image, image], ["x " * 64] * 2, steps=1, prompt_expansion=0, size=engine.sampling.size)
    assert traced == pytest.approx(tracker.peak - before, rel=SLACK - 1)


@pytest.mark.parametrize("format", ["none", "int8", "nf4"])
def test_resident_weights_are_those_that_are_there(format: Any) -> None:
    if format != "none":
        pytest.importorskip("bitsandbytes")
    engine = diptych.load("toy/omnigen2", device="cpu")
    placement = Placement(quantize=format)
    predicted = resident(engine, placement)
    place(engine.system, placement)
    found = sum(tensor.nbytes for tensor in (*engine.system.parameters(), *engine.system.buffers()))
    for block in blocks(engine.system):
        for layer in block.modules():
            weight: Any = getattr(layer, "weight", None)
            if format == "nf4" and hasattr(weight, "quant_state"):
                found += weight.quant_state.absmax.nbytes + weight.quant_state.state2.absmax.nbytes
            elif format == "int8" and getattr(weight, "SCB", None) is not None:
                found += weight.SCB.nbytes
    assert predicted == pytest.approx(found, rel=0.02)


def test_offload_leaves_the_largest_part_or_two_blocks() -> None:
    engine = loaded("toy/iomm")
    sizes = [resident(engine, Placement(offload=offload)) for offload in ("none", "model", "layers")]
    rest = sum(p.nbytes for p in engine.system.parameters()) - sum(
        p.nbytes for block in blocks(engine.system) for p in block.parameters()
    )
    largest = sorted(sum(p.nbytes for p in block.parameters()) for block in blocks(engine.system))[-2:]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[2] == pytest.approx(rest + sum(largest), rel=0.01)


@pytest.mark.slow
def test_the_cheapest_choice_that_fits_is_taken_and_holds() -> None:
    plain = loaded("toy/iomm")
    engine = Engine(plain.system, replace(plain.sampling, batch_size=4), plain.name)
    gpu = Placement(device="cuda")  # nothing is moved there
    whole = needs(engine, gpu, engine.sampling.batch_size, {}).total + 700 * 10**6
    chosen, count, why = fitted(engine, gpu, whole)
    assert (chosen, count) == (gpu, engine.sampling.batch_size)
    assert why.startswith(f"fit {amount(whole)}: own number format takes")

    one = needs(engine, gpu, 1, {}).total + 700 * 10**6
    chosen, count, why = fitted(engine, gpu, one)
    assert (chosen, count) == (gpu, 1)
    chosen, _, why = fitted(engine, gpu, one - 1)
    assert chosen == Placement(device="cuda", dtype=torch.bfloat16)
    assert "bfloat16 takes" in why
    assert re.search(r"own number format would take 7\d\d(\.\d)?MB$", why)
    costs = [candidate.words() for candidate in candidates(engine, gpu)]
    assert costs[0] == "own number format"
    assert costs.index("bfloat16, offload model") < costs.index("bfloat16, nf4")
    assert {c.dtype for c in candidates(engine, Placement(dtype=torch.float32))} == {torch.float32}


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_the_number_that_does() -> None:
    with pytest.raises(UserError, match=r"fit 1MB: toy/iomm does not fit; .*one image at a time") as told:
        diptych.load("toy/iomm", device="cpu", fit="1MB")
    found = re.search(r"the least is (\S+), with", str(told.value))
    assert found is not None
    model = diptych.load("toy/iomm", device="cpu", fit=found[1])
    assert model.fit.startswith(f"fit {found[1]}: bfloat16")
    assert model.sampling.batch_size == 1
    assert isinstance(model.generate("a red circle", steps=1)[0].size, tuple)


@pytest.mark.slow
def test_fit_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    out = str(tmp_path / "a.png")
    given = ["generate", "toy/iomm", "a red circle", "--steps", "1", "--prompt-expansion", "0", "-o", out]
    assert main([*given, "--device", "cpu", "--fit", "14MB"]) == 0
    assert "fit 14MB: bfloat16" in capsys.readouterr().err
    assert main([*given, "--device", "cpu", "--fit", "14 apples", "--overwrite"]) == 2
    assert "fit 14 apples: write a memory as 24GB" in capsys.readouterr().err
    for option, value in (("--dtype", "bfloat61"), ("--quantize", "int9"), ("--offload", "layer")):
        assert main([*given, "--device", "cpu", option, value, "--overwrite"]) == 2
        assert value in capsys.readouterr().err
    assert main([*given, "--device", "cpu", "--dtype", "bfloat16", "--offload", "layers", "--overwrite"]) == 0


def test_a_placed_model_is_not_moved() -> None:
    model = diptych.load("toy/iomm", device="cpu", offload="layers")
    with pytest.raises(UserError, match="toy/iomm: was loaded with own number format, offload layers; load it again"):
        model.to("cpu")
    plain = np.asarray(loaded("toy/iomm").generate("a red circle", steps=2)[0])
    assert np.array_equal(np.asarray(model.generate("a red circle", steps=2)[0]), plain)
