"""RMS norm and SwiGLU's product with backward passes of their own, for training on a CPU in float32.

There torch computes both from single operations. Autograd then keeps a normed copy beside each input, and SiLU's output
beside its input, and walks each of these operations backwards. Written out, the backward pass keeps the inputs alone
and takes about half the time (docs/performance.md, "The training step"); results are those of the operations. On other
devices, in other number formats and while torch compiles, torch's own kernels stay. W is the width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm (Zhang and Sennrich 2019, arXiv 1910.07467) over the last axis of x (..., W).

    weight: (W,), or any shape that broadcasts to x's, as a vector for each head does; None for 1.
    """
    if written_out(x, weight):
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return]
    if weight is None or weight.ndim == 1:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.rms_norm(x, x.shape[-1:], None, eps) * weight


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, both (..., W): the product inside SwiGLU (Shazeer 2020, arXiv 2002.05202)."""
    if written_out(gate, up):
        return _SiLUTimes.apply(gate, up)  # type: ignore[no-any-return]
    return F.silu(gate) * up


def made_again(function: Callable[[Tensor], Tensor], make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """function(make(*sources)), where the backward pass makes the argument again from its sources, which `make` keeps
    anyway, instead of keeping it: an activation before a linear layer costs far less than the layer.

    Inside recomputed blocks, which keep nothing at all, the argument is treated as any other tensor.
    """
    argument = make(*sources)
    hooked = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]
    if not written_out(argument) or hooked(True) is not None:
        return function(argument)
    place, count = argument.untyped_storage()._cdata, argument.numel()
    known = [(source, source._version) for source in sources]

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        same = tensor.untyped_storage()._cdata == place and tensor.numel() == count and tensor.is_contiguous()
        return tensor.shape if same else tensor

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if any(source._version != version for source, version in known):
            raise RuntimeError("a tensor that the backward pass needs was changed in place")
        with torch.no_grad():
            return make(*sources).view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return function(argument)


def written_out(*tensors: Tensor | None) -> bool:
    """Whether these are inputs that the functions of this file are for."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in given)
        and any(tensor.requires_grad for tensor in given)
    )


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = 1 / sqrt(mean x^2 + eps)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        root = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # r, (..., 1)
        ctx.save_for_backward(x, weight, root)
        normed = x * root
        return normed if weight is None else normed * weight

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = grad_outputs
        x, weight, root = ctx.saved_tensors
        normed = x * root
        of_weight = None
        if weight is not None:
            if ctx.needs_input_grad[1]:
                of_weight = (gradient * normed).sum_to_size(weight.shape)
            gradient = gradient * weight
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        # dx = r (g - n mean(g n)), where n = x r
        along = (gradient * normed).mean(-1, keepdim=True)
        return torch.addcmul(gradient, normed, along, value=-1).mul_(root), of_weight, None


class _SiLUTimes(torch.autograd.Function):
    """y = SiLU(g) u."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        (gradient,) = grad_outputs
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return of_gate, F.silu(gate).mul_(gradient)
