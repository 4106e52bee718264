"""Low-rank updates added to layers beside their weights: several of them, each with a scale; and folded into these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.core.errors import UserError
from diptych.parts.lora import ADAPTER, linear_layers, lora_config


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The update alpha / r times `up` (out, r) `down` (r, in) of a layer's weight (out, in)."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """(out, in), float32."""
        return self.alpha / self.rank * (self.up.float() @ self.down.float())


class AddedLora(nn.Module):
    """A linear layer, quantised or adapted or plain, and the sum of several updates; these are one pair of float32
    matrices, whose inner width is the sum of their ranks."""

    def __init__(self, base: nn.Module, updates: Sequence[tuple[Factors, float]]) -> None:
        super().__init__()
        self.base = base
        downs = [factors.down.float() for factors, _ in updates]
        ups = [scale * factors.alpha / factors.rank * factors.up.float() for factors, scale in updates]
        self.lora_down = nn.Parameter(torch.cat(downs), requires_grad=False)
        self.lora_up = nn.Parameter(torch.cat(ups, dim=1), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """Of the layer alone."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        return out + F.linear(F.linear(x.to(self.lora_down.dtype), self.lora_down), self.lora_up).to(out.dtype)


def attach(module: nn.Module, updates: Mapping[str, Sequence[tuple[Factors, float]]]) -> None:
    """Add updates, each with a scale, to the layers of these names, in place."""
    for name, layers in updates.items():
        parent, _, last = name.rpartition(".")
        owner = module.get_submodule(parent)
        setattr(owner, last, AddedLora(getattr(owner, last), layers))


def trained(module: nn.Module) -> dict[str, Factors]:
    """The updates of the adapters that a module was trained with, by layer; with alpha so that the scale is alpha /
    rank, also where the square root of the rank was taken (rslora)."""
    if lora_config(module) is None:
        return {}
    factors: dict[str, Factors] = {}
    for name, layer in module.named_modules():
        down = getattr(layer, "lora_A", None)
        if isinstance(down, nn.ModuleDict) and ADAPTER in down:
            first, second = down[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()  # type: ignore[union-attr]
            alpha = float(layer.scaling[ADAPTER]) * first.shape[0]  # type: ignore[index]
            factors[name] = Factors(down=first, up=second, alpha=alpha)
    return factors


@torch.no_grad()
def fold(module: nn.Module) -> int:
    """Add all updates of a module, attached and trained ones, to the weights themselves; how many layers there were.

    The sum is made in float32 and rounded once to the weights' format. What learned is then no adapter any more.

    Raises:
        UserError: quantised weights, which cannot take an update.
    """
    adapters, count = trained(module), 0
    for name, layer in list(module.named_modules()):
        added = isinstance(layer, AddedLora)
        inner: Any = layer.base if added else layer
        adapted = hasattr(inner, "base_layer") and hasattr(inner, "lora_A")
        if not (added or adapted) or name.rpartition(".")[2] == "base":  # the last is inside of one that was folded
            continue
        linear = inner.base_layer if adapted else inner
        if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
            raise UserError(f"LoRA: {name} is quantised and cannot take the update; load the model without quantize")
        weight = linear.weight.float()
        if added:
            weight = weight + layer.lora_up @ layer.lora_down
        if adapted:
            weight = weight + adapters[f"{name}.base" if added else name].delta()
        linear.weight.data = weight.to(linear.weight.dtype)
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, linear)
        count += 1
    module.__dict__.pop("peft_config", None)
    return count


@torch.no_grad()
def difference(base: nn.Module, tuned: nn.Module, rank: int) -> tuple[dict[str, Factors], float]:
    """The best updates of this rank from one model's linear layers to another's (Eckart and Young 1936), and the share
    of the difference that they leave out, as a ratio of Frobenius norms over all layers.

    Raises:
        UserError: models of other layers or sizes, or without a difference.
    """
    before, after = linear_layers(base), linear_layers(tuned)
    if before.keys() != after.keys():
        name = sorted(before.keys() ^ after.keys())[0]
        raise UserError(f"the two models have other layers ({name})")
    factors: dict[str, Factors] = {}
    left = whole = 0.0
    for name, layer in before.items():
        if layer.weight.shape != after[name].weight.shape:
            raise UserError(f"{name} has another size in the two models")
        delta = after[name].weight.float() - layer.weight.float()
        if not delta.any():
            continue
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        kept = min(rank, len(s))
        root = s[:kept].sqrt()
        factors[name] = Factors(
            down=(root[:, None] * v[:kept]).contiguous(), up=(u[:, :kept] * root).contiguous(), alpha=float(kept)
        )
        left += float(s[kept:].square().sum())
        whole += float(s.square().sum())
    if not factors:
        raise UserError("the two models' linear layers are equal")
    return factors, (left / whole) ** 0.5
