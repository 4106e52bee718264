"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for whole and for sharded matrices.

Newton-Schulz iterations need a whole matrix. Of sharded ones each process orthogonalises its turn's share and sends the
result round, so that no iteration is computed twice, and the numbers are those of one process.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from diptych.training.tensors import like, local


class Muon(torch.optim.Muon):
    """torch.optim.Muon, with the rate matched to AdamW's scale (Liu et al. 2025, arXiv 2502.16982, Sec. 2.2).

    found_inf: of `apply_update`.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            parameters: list[Tensor] = []
            grads: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, parameters, grads, momenta)
            for turn, (parameter, grad, momentum) in enumerate(zip(parameters, grads, momenta, strict=True)):
                if self.found_inf is not None:  # a gradient that is no number leaves the momentum as it is
                    grad = torch.where(self.found_inf > 0, local(momentum), local(grad))
                # Nesterov's momentum (each shard by itself).
                mean = local(momentum)
                mean.lerp_(local(grad), 1 - group["momentum"])
                update = local(grad).lerp(mean, group["momentum"]) if group["nesterov"] else mean
                # The nearest orthogonal matrix (of the whole one).
                update = self._orthogonal(update, parameter, turn, group)
                rate = 0.2 * math.sqrt(max(parameter.shape)) * group["lr"]
                decay = group["lr"] * group["weight_decay"]
                here = local(parameter)
                after = torch.add(here * (1 - decay), update, alpha=-rate)
                here.copy_(after if self.found_inf is None else torch.where(self.found_inf > 0, here, after))

    def _orthogonal(self, update: Tensor, parameter: Tensor, turn: int, group: dict[str, Any]) -> Tensor:
        """The orthogonal matrix nearest to an update, laid out as its parameter; this process's part of it."""

        def iterate(matrix: Tensor) -> Tensor:
            return newton_schulz(matrix, group["ns_coefficients"], group["ns_steps"], group["eps"])

        if not isinstance(parameter, DTensor):
            return iterate(update)
        whole = DTensor.from_local(
            update, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        ).full_tensor()
        source = turn % dist.get_world_size()
        orthogonal = iterate(whole) if dist.get_rank() == source else whole.to(format_on(whole.device))
        dist.broadcast(orthogonal, source)
        return local(like(orthogonal, parameter))


def format_on(device: torch.device) -> torch.dtype:
    """In which the iterations run: bfloat16, as published, where it is fast; float32 on a CPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """About the orthogonal matrix nearest to `matrix` (A, B), by X <- a X + (b X X' + c (X X')^2) X."""
    a, b, c = coefficients
    x = matrix.to(format_on(matrix.device))
    x = x / x.norm().clamp(min=eps)  # no singular value is above 1
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).contiguous()
