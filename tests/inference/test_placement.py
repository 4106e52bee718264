"""Number formats, quantisation and offload of loaded models."""

from __future__ import annotations

import copy
import functools
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import diptych
from diptych.core.errors import UserError
from diptych.inference.engine import Engine
from diptych.inference.placement import (
    Offload,
    Placement,
    Quantization,
    blocks,
    blocks_by_part,
    cast,
    place,
    quantize,
)

SYSTEMS = ["toy/iomm", "toy/ovis-u1", "toy/omnigen2", "toy/hieraquery", "toy/bagel"]
LIBRARY = {"int8": "bitsandbytes", "fp8": "torchao", "nf4": "bitsandbytes"}


@functools.cache
def loaded(name: str) -> Engine:
    return diptych.load(name, device="cpu")


@functools.cache
def expected(name: str) -> tuple[np.ndarray, str]:
    """A picture and an answer of the model as it is."""
    engine = loaded(name)
    return picture(engine), str(engine.ask(engine.generate("a red circle", steps=1)[0], "what color?"))


def fresh(name: str) -> Engine:
    return copy.deepcopy(loaded(name))


def picture(engine: Engine, prompt: str = "a red circle left of a blue square", **options: Any) -> np.ndarray:
    return np.asarray(engine.generate(prompt, steps=2, **options)[0])


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("kept", ["model", "layers"])
def test_offload_gives_the_same_picture_bit_for_bit(name: str, kept: Offload) -> None:
    engine = fresh(name)
    place(engine.system, Placement(offload=kept))
    away = [p.numel() for block in blocks(engine.system) for p in block.parameters()]
    assert not any(away), "the blocks' weights are not on the device between runs"
    assert np.array_equal(picture(engine), expected(name)[0])
    assert engine.ask(engine.generate("a red circle", steps=1)[0], "what color?") == expected(name)[1]


def test_layers_leave_the_device_again_and_a_part_stays() -> None:
    by_layer, by_part = (fresh("toy/iomm") for _ in range(2))
    place(by_layer.system, Placement(offload="layers"))
    place(by_part.system, Placement(offload="model"))
    resident = []
    for engine in (by_layer, by_part):
        picture(engine)
        resident.append(sum(any(p.numel() for p in block.parameters()) for block in blocks(engine.system)))
    decoder = sum(
        name.startswith("decoder") for name, m in by_part.system.named_modules() if m in blocks(by_part.system)
    )
    assert resident[0] <= 1
    assert resident[1] == decoder > 1


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("format", ["int8", "fp8", "nf4"])
def test_quantised_weights_are_small_and_draw_nearly_the_same(name: str, format: Quantization) -> None:
    pytest.importorskip(LIBRARY[format])
    engine = fresh(name)
    place(engine.system, Placement(quantize=format))

    def plain(block: nn.Module) -> bool:
        return any(type(x.weight).__name__ == "Parameter" for x in block.modules() if isinstance(x, nn.Linear))

    groups = [[plain(x) for x in group] for group in blocks_by_part(engine.system, blocks(engine.system))]
    for group in groups:
        ends = format == "nf4" and len(group) > 2
        assert group == ([True, *[False] * (len(group) - 2), True] if ends else [False] * len(group))
    # All of the scene is said, and no thought comes before it: one word that is drawn otherwise is another scene.
    caption = "a red circle at the top left and a blue square at the top right on a black background"
    before, after = (picture(each, caption, prompt_expansion=0).astype(int) for each in (loaded(name), engine))
    difference = np.abs(after - before).mean()
    assert 0 < difference < 4, "not bit-equal, and close"


def test_casting_keeps_buffers_and_refuses_what_does_not_fit() -> None:
    module = nn.BatchNorm1d(2)
    module.register_buffer("frequencies", torch.tensor([1.0001]), persistent=False)
    cast(module, torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16
    assert module.frequencies.dtype == torch.float32
    layer = nn.Linear(1, 1)
    layer.weight.data.fill_(70_000)
    with pytest.raises(UserError, match=r"float16: weight has values over 65,504"):
        cast(layer, torch.float16)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"quantize: unknown format 'int9'.*'int8'"):
        Placement(quantize="int9")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"offload: unknown value 'layer'.*'layers'"):
        Placement(offload="layer")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="layer 0 learns"):
        quantize([nn.Sequential(nn.Linear(4, 4))], "int8")
    if importlib.util.find_spec("torchao") is None:
        with pytest.raises(UserError, match=r"torchao is missing; pip install 'diptych\[fp8\]'"):
            quantize([nn.Sequential(nn.Linear(4, 4))], "fp8")


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_quantised_blocks_can_be_offloaded(format: Quantization) -> None:
    pictures = []
    for kept in ("none", "layers"):
        engine = fresh("toy/iomm")
        place(engine.system, Placement(quantize=format, offload=kept))  # pyright: ignore[reportArgumentType]
        pictures.append(picture(engine))
    assert np.array_equal(*pictures)
