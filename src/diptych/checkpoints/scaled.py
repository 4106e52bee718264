"""Weights in 8 bits that mean something only together with their scales.

ComfyUI, vLLM and others write a weight as float8 and its scale as a further tensor. Without the scales such a file
holds numbers hundreds of times too large, which diffusers reads with a line in its log (docs/surprises.md).
"""

from __future__ import annotations

from collections.abc import Iterable

SCALES = ("weight_scale", "weight_scale_inv", "scale_weight", "scale_input", "input_scale", "scaled_fp8")
"""Last parts of the names of scales."""


def scale_hint(unexpected: Iterable[str]) -> str:
    """What to add to an error about these unknown names; "" where none of them is a scale."""
    scales = sorted(name for name in unexpected if name.rpartition(".")[2] in SCALES)
    if not scales:
        return ""
    return f" ({scales[0]} scales 8-bit weights, which are not read; take the release in bfloat16)"
