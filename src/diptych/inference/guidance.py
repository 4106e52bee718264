"""Classifier-free guidance: composes velocity functions; all branches run as one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diptych.core.condition import Condition
from diptych.inference.sampler import Velocity
from diptych.systems.base import System


def guided(system: System, branches: Sequence[Condition], scales: Sequence[float]) -> Velocity:
    """Velocity v_0 + sum_i s_i (v_i - v_(i-1)) over branches ordered from the least to the most conditioned.

    One branch is plain sampling; two are text guidance v_null + s (v - v_null); three are image and text guidance
    (Ovis-U1, Sec. 3; InstructPix2Pix, Eq. 3): [null, image, image + text] with scales [s_image, s_text].

    Args:
        branches: conditions of the same batch. scales: one fewer.
    """
    assert len(scales) == len(branches) - 1, "one scale for every branch but the first"
    joined = branches[0].join(branches[1:])
    count = len(branches)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        each = system.velocity(torch.cat([x] * count), torch.cat([t] * count), joined).chunk(count)
        v = each[0]
        for before, after, scale in zip(each[:-1], each[1:], scales, strict=True):
            v = v + scale * (after - before)
        return v

    return velocity
