"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on any part, through PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diptych.checkpoints.tensors import LORA
from diptych.core.errors import UserError, unknown
from diptych.parts.backbones.base import Backbone
from diptych.parts.decoders.base import Decoder

ADAPTER = "default"
SECOND = ".lora_B."
"""In the names of adapters' second factors."""


def add_lora(
    part: nn.Module, rank: int, alpha: float, dropout: float, targets: Sequence[str], rslora: bool = False
) -> None:
    """Put adapters on the linear layers whose names end in one of `targets`, in place; only adapters stay trainable.

    Starts as the unchanged part, since the second factor is zero. Adapters are float32, whatever the part is.

    Args:
        part: any decoder, or a language model: of a backbone, layers of its language model get adapters, not of its
            vision tower.
        rank: inner width of the adapters.
        alpha: scale, in units of `rank`: the update is alpha / rank times B A.
        dropout: on the adapters' input.
        targets: last parts of module names ("to_q", "to_out.0").
        rslora: the update is alpha / sqrt(rank) times B A instead (Kalajdzievski 2023, arXiv 2312.03732).

    Raises:
        UserError: a target that names no linear layer, a rank below 1, or a part that has adapters.
    """
    if rank < 1:
        raise UserError(f"LoRA: rank must be at least 1, got {rank}")
    module = adapted_module(part)
    if lora_config(module) is not None:
        raise UserError("LoRA: this part has adapters already")
    linear = adaptable(part)
    for target in targets:
        if not any(ends_in(name, target) for name in linear):
            raise unknown("LoRA target", target, {leaf(name) for name in linear})
    wanted = [name for name in linear if any(ends_in(name, target) for target in targets)]
    # PEFT would adapt layers of the same name elsewhere (in a vision tower) too: then the layers are named in full.
    everywhere = [name for name in linear_layers(module) if any(ends_in(name, target) for target in targets)]
    named = list(targets) if len(everywhere) == len(wanted) else wanted
    inject(
        module,
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=named, use_rslora=rslora),  # pyright: ignore[reportArgumentType]
    )


def adapted_module(part: nn.Module) -> nn.Module:
    """Where adapters live: the library's model itself where there is one, so that files fit it directly."""
    return part.adapter_home if isinstance(part, Backbone | Decoder) else part


def adaptable(part: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers that may get adapters, by their names in `adapted_module`; of a backbone, its language model's."""
    linear = linear_layers(adapted_module(part))
    if not isinstance(part, Backbone):
        return linear
    inside = {id(module) for name in ("llm", "t5") for module in _modules(part.named_parts().get(name))}
    return {name: layer for name, layer in linear.items() if id(layer) in inside}


def _modules(part: nn.Module | None) -> list[nn.Module]:
    return [] if part is None else list(part.modules())


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers by name, those of adapters left out; an adapted layer by its own name."""
    return {
        name.removesuffix(".base_layer"): child
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and LORA not in name
    }


def ends_in(name: str, target: str) -> bool:
    """Whether a layer is targeted by the last parts of its name."""
    return name == target or name.endswith(f".{target}")


def inject(module: nn.Module, config: LoraConfig, adapter: str = ADAPTER) -> None:
    """Adapters into `module`, in float32; everything else is frozen."""
    module.requires_grad_(False)
    inject_adapter_in_model(config, module, adapter_name=adapter)
    for name, parameter in module.named_parameters():
        if LORA in name and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32)


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """A module as it is without its adapters inside the block, which then take no time either."""
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True  # pyright: ignore[reportPrivateUsage]  # `enable_adapters` thaws them besides
    try:
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off  # pyright: ignore[reportPrivateUsage]


def without_effect(values: Mapping[str, Tensor]) -> bool:
    """Whether these weights are all of adapters that add nothing, as new ones do, whose second factor is zero."""
    seconds = [value for name, value in values.items() if SECOND in name]
    return all(LORA in name for name in values) and bool(seconds) and not any(bool(x.any()) for x in seconds)


def lora_config(module: nn.Module, adapter: str = ADAPTER) -> LoraConfig | None:
    """The configuration of the adapters in `module`, None where there are none."""
    configs: dict[str, Any] = module.__dict__.get("peft_config") or {}
    return configs.get(adapter)


def leaf(name: str) -> str:
    """The name by which a layer is targeted: its last part, with the part before where that is a number."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
