"""A model into the memory of a device: which of number format, quantisation, offload and tiles it takes."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diptych.checkpoints.tensors import WEIGHT_FORMATS, weight_format
from diptych.core.errors import UserError
from diptych.core.sample import Sample
from diptych.inference.engine import Engine
from diptych.inference.placement import (
    Offload,
    Placement,
    Quantization,
    blocks,
    blocks_by_part,
    quantized_blocks,
)
from diptych.recipes.quantized_stand_in import quantized_bytes
from diptych.systems.base import AssembledSystem
from diptych.training.memory import AllocationTracker

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B|)", re.IGNORECASE)

TILE = 512
"""Side in pixels of the tiles that are tried."""

COSTS = {"bfloat16": 1, "tile": 2, "model": 3, "int8": 4, "nf4": 6, "layers": 8}
"""What each choice costs in quality or time; the cheapest sum that fits is taken. bfloat16 changes pictures least and
is the fastest; tiles and moved parts cost time, and quantised weights quality, before the slow streaming of layers."""

CONTEXT_BYTES = {"cuda": 700 * 10**6}
"""What a device's driver and kernels take beside the tensors."""

SLACK = 1.1
"""Working memory is counted so many times: allocators round up and leave gaps."""


def memory(text: str | int, option: str = "fit") -> int:
    """ "24GB" (10^9 bytes), "24GiB" (2^30), "800MB" or a number of bytes from a million on, as bytes; UserError for
    anything else."""
    match = _MEMORY.fullmatch(str(text).strip())
    value = 0 if match is None else int(float(match[1]) * UNITS[match[2].upper()])
    if value < 1 or (match is not None and not match[2] and value < 10**6):
        raise UserError(f"{option} {text}: write a memory as 24GB, 24GiB or 800MB")
    return value


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes on the device. weights: those that are there at a time. working: all else, at its greatest."""

    weights: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.working


def fitted(engine: Engine, given: Placement, budget: int) -> tuple[Placement, int, str]:
    """Where a model in host memory goes so that it takes at most `budget` bytes of its device; how many images at a
    time it draws then; and in words what was chosen and why.

    What `given` says stays; what it leaves open is chosen, the number of images at a time after all else.

    Raises:
        UserError: nothing fits; it names the smallest memory that would do.
    """
    traces: Traces = {}
    tried = [(candidate, needs(engine, candidate, 1, traces)) for candidate in candidates(engine, given)]
    fixed = CONTEXT_BYTES.get(given.device.partition(":")[0], 0)
    fits = [(candidate, need) for candidate, need in tried if need.total + fixed <= budget]
    if not fits:
        smallest, need = min(tried, key=lambda pair: pair[1].total)
        raise UserError(
            f"fit {amount(budget)}: {engine.name} does not fit; the least is {amount(need.total + fixed, up=True)}, "
            f"with {smallest.words()}, one image at a time"
        )
    chosen, need = fits[0]
    count, size = 1, need
    while count < engine.sampling.batch_size:
        more = needs(engine, chosen, min(2 * count, engine.sampling.batch_size), traces)
        if more.total + fixed > budget:
            break
        count, size = min(2 * count, engine.sampling.batch_size), more
    plain, plain_need = tried[0]
    why = "" if plain == chosen else f"; {plain.words()} would take {amount(plain_need.total + fixed, up=True)}"
    height, width = engine.sampling.size
    images = "one image" if count == 1 else f"{count} images"
    return (
        chosen,
        count,
        f"fit {amount(budget)}: {chosen.words()} take{'' if ',' in chosen.words() else 's'} "
        f"{amount(size.total + fixed, up=True)} (weights {amount(size.weights)}, working memory "
        f"{amount(size.working)} for {images} of {height}x{width} at a time){why}",
    )


def candidates(engine: Engine, given: Placement) -> list[Placement]:
    """All placements that agree with what was given, the one with the least cost first."""
    gpu = not given.device.startswith("cpu")
    stored = weight_format(engine.system)
    dtypes = [given.dtype]
    if given.dtype is None and stored == torch.float32:
        dtypes.append(torch.bfloat16)
    formats: list[Quantization] = [given.quantize]
    if given.quantize == "none" and importlib.util.find_spec("bitsandbytes"):
        formats = [given.quantize, "int8", "nf4"]
    offloads: list[Offload] = [given.offload]
    if given.offload == "none" and gpu:  # on a CPU the weights are in host memory anyhow
        offloads = [given.offload, "model", "layers"]
    tiles = [given.tile]
    if given.tile is None and isinstance(engine.system, AssembledSystem) and max(engine.sampling.size) > TILE:
        tiles.append(TILE)
    made = [
        replace(given, dtype=dtype, quantize=quantize, offload=offload, tile=tile)
        for dtype, quantize, offload, tile in itertools.product(dtypes, formats, offloads, tiles)
    ]

    def cost(candidate: Placement) -> int:
        names = [str(candidate.dtype).removeprefix("torch."), candidate.quantize, candidate.offload]
        return sum(COSTS.get(name, 0) for name in names) + (COSTS["tile"] if candidate.tile else 0)

    return sorted(made, key=cost)


Traces = dict[tuple[torch.dtype | None, int, int | None], int]
"""Working memory by number format, number of images and tile: quantisation and offload do not change it."""


def needs(engine: Engine, placement: Placement, count: int, traces: Traces) -> Need:
    """What a model takes of its device while it draws `count` images at a time, or edits as many."""
    quantized = placement.quantize != "none"
    largest = max((linear.weight.numel() for linear in linears(engine)), default=0) if quantized else 0
    wide = (placement.dtype or weight_format(engine.system)).itemsize
    traced = (placement.dtype, count, placement.tile)
    if traced not in traces:
        traces[traced] = working_memory(engine, *traced)
    working = int(SLACK * traces[traced]) + largest * wide  # the weights of a layer are widened while it runs
    return Need(weights=resident(engine, placement), working=working)


def resident(engine: Engine, placement: Placement) -> int:
    """Bytes of the weights that are on the device at a time."""
    system = engine.system

    def size(tensor: Tensor) -> int:
        plain = placement.dtype is not None and tensor.dtype in WEIGHT_FORMATS.values()
        return tensor.numel() * (placement.dtype.itemsize if plain and placement.dtype else tensor.itemsize)

    inner = {id(unit) for unit in quantized_blocks(system, placement.quantize)}

    def block_size(block: nn.Module) -> float:
        total = 0.0
        layers = block.modules() if id(block) in inner else ()
        quantised = {id(layer.weight): layer for layer in layers if type(layer) is nn.Linear}
        for parameter in {id(p): p for p in block.parameters()}.values():
            layer = quantised.get(id(parameter))
            if layer is None or placement.quantize == "none":
                total += size(parameter)
            else:
                total += quantized_bytes(layer, placement.quantize)
        return total + sum(buffer.nbytes for buffer in block.buffers())

    units = blocks(system)
    inside = {id(tensor) for unit in units for tensor in (*unit.parameters(), *unit.buffers())}
    rest = sum(size(tensor) for tensor in system.parameters() if id(tensor) not in inside)
    rest += sum(tensor.nbytes for tensor in system.buffers() if id(tensor) not in inside)
    sizes = {id(unit): block_size(unit) for unit in units}
    if placement.offload == "none":
        total = sum(sizes.values())
    elif placement.offload == "model":
        total = max((sum(sizes[id(unit)] for unit in group) for group in blocks_by_part(system, units)), default=0)
    else:
        total = sum(sorted(sizes.values())[-2:])  # the block that runs and the next one
    return math.ceil(rest + total)


def linears(engine: Engine) -> list[nn.Linear]:
    """The layers that quantisation replaces."""
    return [layer for unit in blocks(engine.system) for layer in unit.modules() if type(layer) is nn.Linear]


def working_memory(engine: Engine, dtype: torch.dtype | None, count: int, tile: int | None) -> int:
    """Bytes beside the weights at the worst moment of drawing or editing `count` images, by a trace of one step on
    tensors without memory, of all that the engine runs but the model's writing of texts."""
    system = without_values(engine.system, dtype)
    height, width = engine.sampling.size
    if "text_to_image" not in system.tasks:
        return 0
    if isinstance(system, AssembledSystem):
        system.autoencoder.tile = tile
    text = "x " * 64
    image = torch.zeros(3, height, width)
    request = Sample(id="request", task="text_to_image", text=text)
    if "edit" in system.tasks:
        request = Sample(id="request", task="edit", text=text, context_images=(image,), size=(height, width))
    traced = Engine(system, engine.sampling, engine.name)
    tracker = AllocationTracker()
    for tensor in (*system.parameters(), *system.buffers()):
        tracker.add(tensor)
    before = tracker.now
    with tracker, SameShapesAreEqual():
        traced.tensors([request] * count, n=1, seed=0, steps=1, prompt_expansion=0, batch_size=count)
    return tracker.peak - before


class SameShapesAreEqual(TorchDispatchMode):
    """Tensors without values count as equal where their shapes are: guidance's branches ask whether they share a
    reference image, which they do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.equal.default and any(isinstance(x, FakeTensor) for x in args):
            return args[0].shape == args[1].shape
        return func(*args, **(kwargs or {}))


def without_values(system: Any, dtype: torch.dtype | None) -> Any:
    """A copy of a system, in `dtype`, whose weights are fake tensors: they have a shape and a format and no memory."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}
    for tensor in (*system.parameters(), *system.buffers()):
        floating = tensor.is_floating_point() or tensor.is_complex()
        if not floating and not isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = tensor  # an index, whose values a run may depend on
            continue
        learned = isinstance(tensor, nn.Parameter)
        wanted = dtype if dtype is not None and learned and tensor.dtype in WEIGHT_FORMATS.values() else tensor.dtype
        with mode:
            fake = torch.empty(tensor.shape, dtype=wanted, device="cpu")
        memo[id(tensor)] = nn.Parameter(fake, requires_grad=False) if learned else fake
    return copy.deepcopy(system, memo)


def amount(count: int, *, up: bool = False) -> str:
    """Bytes in words that `memory` reads; `up` rounds up."""
    unit = "GB" if count >= 10**9 else "MB"
    value = count / UNITS[unit] * 10
    return f"{(math.ceil(value) if up else round(value)) / 10:g}{unit}"
