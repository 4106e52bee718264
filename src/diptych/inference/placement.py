"""Where the weights of a loaded model live, and in which number format: casting, quantisation and offload."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from diptych.checkpoints.tensors import LORA, WEIGHT_FORMATS
from diptych.core.errors import UserError, unknown
from diptych.systems.base import AssembledSystem, System

Quantization = Literal["none", "int8", "fp8", "nf4"]
"""Formats of the weights of linear layers inside blocks: `int8` by bitsandbytes, one scale for each output channel
(LLM.int8(), Dettmers et al. 2022); `nf4` by bitsandbytes, one scale for each 64 weights, itself of 8 bits (QLoRA,
Dettmers et al. 2023, Sec. 3); `fp8` (e4m3) by torchao, one scale for each output channel."""

Offload = Literal["none", "model", "layers"]
"""What stays on the device: `none` offloads nothing; `model` keeps the blocks of the part that runs (the language
model, the decoder, ...); `layers` keeps the block that runs and the next one. The rest is in host memory."""

EXTRAS = {"int8": "quantize", "nf4": "quantize", "fp8": "fp8"}
"""The extra of Diptych that brings the library of each format."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """device: "cpu", "cuda", "mps". dtype: None leaves each weight in its own format. tile: side in pixels of the
    squares that larger images are decoded in (`Autoencoder.tile`); None for whole images.

    Raises:
        UserError: an unknown value of `quantize` or `offload`, or a tile without a size.
    """

    device: str = "cpu"
    dtype: torch.dtype | None = None
    quantize: Quantization = "none"
    offload: Offload = "none"
    tile: int | None = None

    def __post_init__(self) -> None:
        if self.quantize not in get_args(Quantization):
            raise unknown("format", self.quantize, get_args(Quantization), "quantize")
        if self.offload not in get_args(Offload):
            raise unknown("value", self.offload, get_args(Offload), "offload")
        if self.tile is not None and self.tile < 1:
            raise UserError(f"tile must be at least 1 pixel, not {self.tile}")

    def words(self) -> str:
        """Its choices in a few words."""
        dtype = "own number format" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        others = [self.quantize] if self.quantize != "none" else []
        others += [f"offload {self.offload}"] if self.offload != "none" else []
        others += [f"tile {self.tile}"] if self.tile is not None else []
        return ", ".join([dtype, *others])


def place(system: System, placement: Placement) -> None:
    """Bring a system in host memory into its number format and onto its device, in place.

    Raises:
        UserError: a format that the device or the installation has not.
    """
    check_dtype(placement.device, placement.dtype)
    if placement.tile is not None:
        if not isinstance(system, AssembledSystem):
            raise UserError("tile: this model makes no images")
        system.autoencoder.tile = placement.tile
    system.requires_grad_(False)
    if placement.dtype is not None:
        cast(system, placement.dtype)
    if placement.quantize != "none":
        quantize(quantized_blocks(system, placement.quantize), placement.quantize)
    if placement.offload == "none":
        system.to(placement.device)
    else:
        offload(system, torch.device(placement.device), by_part=placement.offload == "model")


DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
"""Kinds of devices, or `auto`."""


def device_named(name: str) -> str:
    """`auto` as the best device there is; UserError for one that is not there, or that no model runs on."""
    if name.partition(":")[0] not in DEVICES:
        raise unknown("device", name, ("cuda:1", *DEVICES), "device")
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "auto":
        return best
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name}: not available here; the best there is: {best}") from error
    return name


def number_format(dtype: str | torch.dtype) -> torch.dtype:
    """A number format by its name ("bfloat16"); UserError for one that weights are not kept in."""
    if isinstance(dtype, torch.dtype) and dtype in WEIGHT_FORMATS.values():
        return dtype
    name = str(dtype).removeprefix("torch.")
    if name not in WEIGHT_FORMATS:
        raise unknown("dtype", name, WEIGHT_FORMATS)
    return WEIGHT_FORMATS[name]


def check_dtype(device: str, dtype: torch.dtype | None) -> None:
    """UserError where a device does not compute in a number format."""
    if dtype == torch.bfloat16 and device.startswith("cuda") and not torch.cuda.is_bf16_supported():
        name = torch.cuda.get_device_name(device)
        raise UserError(f"dtype bfloat16: {name} does not compute in it; use float16 or float32")


def cast(system: nn.Module, dtype: torch.dtype) -> None:
    """Parameters in `dtype`; buffers (frequencies of rotary positions, for example) and adapters keep their format.

    Raises:
        UserError: a weight that `dtype` cannot hold.
    """
    largest = torch.finfo(dtype).max
    for name, parameter in system.named_parameters():
        if parameter.dtype not in WEIGHT_FORMATS.values() or parameter.dtype == dtype or LORA in f".{name}":
            continue
        if (
            dtype == torch.float16
            and parameter.numel()
            and not parameter.is_meta
            and float(parameter.detach().abs().max()) > largest
        ):
            raise UserError(f"dtype float16: {name} has values over {largest:,.0f}; use bfloat16")
        parameter.data = parameter.data.to(dtype)


def blocks(system: System) -> list[nn.Module]:
    """The repeated blocks of a system's networks, each run as a whole by its `forward`."""
    return list(system.shard_units())


def quantized_blocks(system: System, format: Quantization) -> list[nn.Module]:
    """The blocks whose layers are put into a format for inference: all of them, but with 4 bits the first and the last
    of each part, which read and write what no other block corrects (docs/log.md has scores)."""
    units = blocks(system)
    if format != "nf4":
        return units
    groups = [group for group in blocks_by_part(system, units) if len(group) > 2]
    ends = {id(group[place]) for group in groups for place in (0, -1)}
    return [unit for unit in units if id(unit) not in ends]


def quantize(
    modules: Iterable[nn.Module], format: Quantization, convert: Callable[[nn.Linear], nn.Module] | None = None
) -> int:
    """Put the weights of all linear layers inside `modules`, but for those of adapters, into a quantised format; how
    many layers there were.

    Args:
        convert: makes the quantised layer; by default by the format's library.

    Raises:
        UserError: the library is not installed, or a layer learns.
    """
    try:
        convert = convert or (_to_fp8() if format == "fp8" else _by_bitsandbytes(format))
    except ImportError as error:
        raise UserError(
            f"quantize {format}: {error.name} is missing; pip install 'diptych[{EXTRAS[format]}]'"
        ) from error
    count = 0
    for module in modules:
        for place, parent in list(module.named_modules()):
            for name, layer in list(parent.named_children()):
                if (
                    type(layer) is not nn.Linear or LORA in f".{place}.{name}"
                ):  # a subclass computes something of its own
                    continue
                if layer.weight.requires_grad:
                    raise UserError(f"quantize {format}: layer {name} learns; freeze it, or train LoRA on it")
                setattr(parent, name, convert(layer))
                count += 1
    return count


def _to_fp8() -> Callable[[nn.Linear], nn.Module]:
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]  # an extra of its own
        Float8WeightOnlyConfig,
        quantize_,
    )

    def convert(layer: nn.Linear) -> nn.Module:
        quantize_(layer, Float8WeightOnlyConfig())
        return layer

    return convert


def _by_bitsandbytes(format: Quantization) -> Callable[[nn.Linear], nn.Module]:
    from bitsandbytes.nn import modules

    def convert(layer: nn.Linear) -> nn.Module:
        sizes: Any = (layer.in_features, layer.out_features, layer.bias is not None)
        if format == "nf4":
            quantized: Any = modules.Linear4bit(*sizes, quant_type="nf4", compute_dtype=layer.weight.dtype)
        else:
            quantized = modules.Linear8bitLt(*sizes, has_fp16_weights=False)
        quantized.load_state_dict(layer.state_dict())
        if layer.bias is not None:
            quantized.bias.data = layer.bias.data  # in its own number format
        quantized.requires_grad_(False)
        return quantized.to(layer.weight.device)  # the weights are quantised as they are moved

    return convert


class _Streamed:
    """A block whose weights are in host memory and come to the device for each of its runs.

    The weights of a block that is away are replaced by empty tensors, so that a use of them outside of its `forward`
    ends in an error and not in a wrong number.
    """

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self.device = device
        self.places: list[tuple[dict[str, Any], str]] = [
            (table, name)
            for module in block.modules()
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is not None
        ]
        self.host = [_in_host_memory(table[name], device) for table, name in self.places]
        self.ready: Any = None
        self.resident = True
        self.release()

    def fetch(self, stream: Any = None) -> None:
        """Start copying the weights to the device, beside what runs there where there is a `stream`."""
        if self.resident:
            return
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            for (table, name), stored in zip(self.places, self.host, strict=True):
                table[name] = _like(stored, stored.to(self.device, non_blocking=stream is not None))
            self.ready = None if stream is None else stream.record_event()
        self.resident = True

    def wait(self) -> None:
        """Let what runs on the device from here on wait for the copy."""
        if self.ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self.ready)
            for table, name in self.places:
                table[name].record_stream(current)
            self.ready = None

    def release(self) -> None:
        """Give the device's memory back; inference changes no weight, so nothing is copied."""
        for (table, name), stored in zip(self.places, self.host, strict=True):
            empty = torch.empty(0, device=self.device, dtype=stored.dtype if stored.is_floating_point() else None)
            table[name] = _like(stored, empty)
        self.resident = False


def _in_host_memory(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in host memory, page-locked where a GPU will copy from it; quantised weights keep their kind."""
    stored = tensor.to("cpu")
    plain = type(stored) in (Tensor, nn.Parameter)
    return _like(tensor, stored.detach().pin_memory()) if device.type == "cuda" and plain else stored


def _like(stored: Tensor, value: Tensor) -> Tensor:
    """`value` as a parameter where `stored` is one."""
    if isinstance(stored, nn.Parameter) and not isinstance(value, nn.Parameter):
        return nn.Parameter(value, requires_grad=False)
    return value


def offload(system: System, device: torch.device, *, by_part: bool = False) -> None:
    """Keep the blocks of a system in host memory and bring each to `device` when it runs; all else stays there.

    by_part: all blocks of a part (`llm`, `decoder`) come together and stay until those of another part run. Otherwise
    each block comes by itself, and the next one of its part is copied while it runs.
    """
    units = blocks(system)
    groups = blocks_by_part(system, units) if by_part else [[block] for block in units]
    streamed = [[_Streamed(block, device) for block in group] for group in groups]
    system.to(device)  # what is in no block; blocks are empty by now
    stream = torch.cuda.Stream(device) if device.type == "cuda" and not by_part else None
    for place, group in enumerate(groups):
        following = streamed[(place + 1) % len(streamed)]
        for block in group:
            block.register_forward_pre_hook(_Arrival(streamed, place, following if not by_part else [], stream))
            if not by_part:
                block.register_forward_hook(_Departure(streamed[place]), always_call=True)


class _Arrival:
    """Before a block runs: its group is on the device, other groups are not, and the next is on its way."""

    def __init__(
        self, streamed: Sequence[Sequence[_Streamed]], place: int, following: Sequence[_Streamed], stream: Any
    ) -> None:
        self.streamed, self.place, self.following, self.stream = streamed, place, following, stream

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        kept = {id(block) for block in (*self.streamed[self.place], *self.following)}
        for group in self.streamed:
            for block in group:
                if block.resident and id(block) not in kept:
                    block.release()
        for block in self.streamed[self.place]:
            block.fetch(self.stream)
        for block in self.streamed[self.place]:
            block.wait()
        if self.stream is not None:
            for block in self.following:
                block.fetch(self.stream)


class _Departure:
    """After a block has run, its weights leave the device."""

    def __init__(self, streamed: Sequence[_Streamed]) -> None:
        self.streamed = streamed

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> None:
        for block in self.streamed:
            block.release()


def blocks_by_part(system: System, units: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """The blocks, grouped by the part that they belong to."""
    groups: dict[str, list[nn.Module]] = {}
    owner = {id(p): name for name, part in system.named_parts().items() for p in part.parameters()}
    for block in units:
        first = next(iter(block.parameters()))
        groups.setdefault(owner[id(first)], []).append(block)
    return list(groups.values())
