"""Layers of quantised weights in traces of memory: the bytes of their format, and whole weights where they are used."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.inference.placement import Quantization

QUANTISED = {"int8": 1.0, "nf4": 0.5 + 1 / 64, "fp8": 1.0}
"""Bytes of a weight in each format; nf4 has a scale of 8 bits for each 64, and further scales of these."""


def quantized_bytes(layer: nn.Linear, format: Quantization) -> int:
    """Bytes of the weight of a layer in a format, with its scales."""
    scales = 0 if format == "nf4" else 4 * layer.out_features
    return math.ceil(QUANTISED[format] * layer.weight.numel()) + scales


class QuantizedStandIn(nn.Module):
    """A linear layer whose weight is so many bytes; for each use, forward and backward, it is widened and let go.

    Args:
        widened: number format of what the layer computes with.
    """

    def __init__(self, format: Quantization, layer: nn.Linear, *, widened: torch.dtype) -> None:
        super().__init__()
        size = quantized_bytes(layer, format)
        self.weight = nn.Parameter(
            torch.empty(size, dtype=torch.uint8, device=layer.weight.device), requires_grad=False
        )
        self.bias = layer.bias
        self.shape, self.widened = layer.weight.shape, widened

    def forward(self, x: Tensor) -> Tensor:
        whole = self.weight.new_empty(self.shape, dtype=self.widened)
        address = whole.untyped_storage()._cdata

        def pack(tensor: Tensor) -> Any:
            again = tensor.untyped_storage()._cdata == address
            return (tensor.shape, tensor.stride()) if again else tensor

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            return self.weight.new_empty(self.shape, dtype=self.widened).as_strided(*kept)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack), torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else self.bias.to(self.widened)
            return F.linear(x.to(self.widened), whole, bias).to(x.dtype)
