"""AdamW, AdamW with moments of a byte, and Muon with AdamW for what is no matrix inside a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.optim import Optimizer
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from diptych.core.errors import UserError
from diptych.training.config import OptimizerConfig
from diptych.training.muon import Muon

FUSED = _get_fused_kernels_supported_devices()
"""Devices on which a step of AdamW is one kernel, which can leave the weights as they are (`apply_update`)."""
BLOCK = 256
"""Moments that share a scale, in bitsandbytes."""
SMALL = 4096
"""Parameters of fewer elements keep moments in float32, as bitsandbytes has it."""


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that learn, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def build_optimizers(
    config: OptimizerConfig, parameters: dict[str, nn.Parameter], blocks: Iterable[nn.Module]
) -> list[Optimizer]:
    """Optimisers over the given parameters; every parameter is in exactly one.

    Args:
        blocks: modules whose two-dimensional weights Muon takes; embeddings, norms, biases and the layers at both ends
            stay with AdamW.

    Raises:
        UserError: `adamw8bit` without bitsandbytes.
    """
    inside = {id(parameter) for block in blocks for parameter in block.parameters() if parameter.ndim == 2}
    muon = [p for p in parameters.values() if config.kind == "muon" and id(p) in inside]
    taken = {id(p) for p in muon}
    rest = [p for p in parameters.values() if id(p) not in taken]
    optimizers: list[Optimizer] = []
    if muon:
        optimizers.append(
            Muon(
                muon,
                lr=config.lr,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    if rest and config.kind == "adamw8bit":
        optimizers.append(eight_bit(config, rest))
    elif rest:
        options = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
        fused = all(p.device.type in FUSED for p in rest)  # the meta device has no kernels
        optimizers.append(torch.optim.AdamW(rest, lr=config.lr, fused=fused, foreach=not fused, **options))
    return optimizers


def eight_bit(config: OptimizerConfig, parameters: list[nn.Parameter]) -> Optimizer:
    """bitsandbytes' AdamW8bit; what stands for it where the parameters have no memory."""
    if any(isinstance(p, FakeTensor) or isinstance(p.data, FakeTensor) or p.is_meta for p in parameters):
        return StatesAlone(parameters)
    try:
        from diptych.training.eight_bit import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"optimizer.kind adamw8bit: {error.name} is missing; pip install 'diptych[quantize]'"
        ) from error
    return AdamW8bit(parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


class StatesAlone(Optimizer):
    """Stands for `eight_bit.AdamW8bit`, whose library need not be there, where parameters have no memory.

    A step makes the states, in their sizes.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if self.state[p]:
                    continue
                small = p.numel() < SMALL
                for moment in ("1", "2"):
                    self.state[p][f"state{moment}"] = torch.zeros_like(p, dtype=torch.float32 if small else torch.uint8)
                    if not small:
                        self.state[p][f"absmax{moment}"] = p.new_zeros(-(-p.numel() // BLOCK), dtype=torch.float32)
        return None


def set_rate(optimizers: Sequence[Optimizer], lr: float) -> None:
    """Set the learning rate of every group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def apply_update(optimizers: Sequence[Optimizer], skip: Tensor) -> None:
    """An optimiser step, and gradients cleared.

    Args:
        skip: 1.0 on the device where weights and state are to stay as they are, as after a gradient that is no number;
            else 0.0. The host need not know which.
    """
    for optimizer in optimizers:
        optimizer.found_inf = skip  # type: ignore[attr-defined]  # as torch's GradScaler gives it to fused optimisers
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
