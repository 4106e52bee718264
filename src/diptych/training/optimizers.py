"""AdamW, and Muon with AdamW for what is no matrix inside a block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from diptych.training.config import OptimizerConfig


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
    """
    inside = {id(parameter) for block in blocks for parameter in block.parameters() if parameter.ndim == 2}
    muon = [p for p in parameters.values() if config.kind == "muon" and id(p) in inside]
    taken = {id(p) for p in muon}
    rest = [p for p in parameters.values() if id(p) not in taken]
    found: list[Optimizer] = []
    if muon:
        found.append(
            torch.optim.Muon(
                muon,
                lr=config.lr,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    if rest:
        found.append(
            torch.optim.AdamW(
                rest, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, foreach=True
            )
        )
    return found


def set_rate(optimizers: Sequence[Optimizer], lr: float) -> None:
    """Set the learning rate of every group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
