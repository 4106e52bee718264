"""Classifier-free guidance: composes velocity functions; all branches run as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from diptych.core.condition import Condition
from diptych.core.errors import unknown
from diptych.inference.sampler import Velocity
from diptych.systems.base import System

Rule = Literal["chain", "omnigen2", "bagel"]
"""Which branches a request has. `chain`: a branch for each scale that is not 1; text guidance of an edit starts from
the edit without its text. `omnigen2`: a scale acts above 1 only, image guidance acts together with text guidance only,
and text guidance alone starts from a request without text and images. `bagel`: see `inference.renormalise`."""

Branch = Literal["null", "image", "text", "full"]
"""A request without text and context images, without text, without context images, and as it is."""

ALWAYS = (0.0, 1.0)


def plan(rule: Rule, cfg: float, image_cfg: float, *, edits: bool) -> tuple[list[Branch], list[float]]:
    """Branches from the least to the most conditioned, and the scale of each step between them; of `bagel` the branches
    that `inference.renormalise.nested` takes, in its order, and no scales.

    Args:
        cfg: text guidance scale. image_cfg: image guidance scale. edits: whether requests have context images.

    Raises:
        UserError: an unknown rule.
    """
    if rule not in get_args(Rule):
        raise unknown("guidance", rule, get_args(Rule))
    if rule == "bagel":
        others: list[Branch] = ["image", "text"]
        return ["full", *others[: (cfg > 1) + (cfg > 1 and image_cfg > 1)]], []
    text = cfg > 1 if rule == "omnigen2" else cfg != 1
    image = edits and (image_cfg > 1 and text if rule == "omnigen2" else image_cfg != 1)
    if image:
        return ["null", "image", "full"], [image_cfg, cfg]
    if not text:
        return ["full"], []
    return ["image" if edits and rule == "chain" else "null", "full"], [cfg]


def guided(
    system: System, branches: Sequence[Condition], scales: Sequence[float], within: tuple[float, float] = ALWAYS
) -> Velocity:
    """Velocity v_0 + sum_i s_i (v_i - v_(i-1)) over branches ordered from the least to the most conditioned.

    One branch is plain sampling; two are text guidance v_null + s (v - v_null); three are image and text guidance
    (Ovis-U1, Sec. 3; InstructPix2Pix, Eq. 3): [null, image, image + text] with scales [s_image, s_text].

    Args:
        branches: conditions of the same batch. scales: one fewer.
        within: least and greatest time at which guidance acts; at others the last branch runs alone.
    """
    assert len(scales) == len(branches) - 1, "one scale for every branch but the first"
    joined = branches[0].join(branches[1:])
    count = len(branches)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if within != ALWAYS and not within[0] <= float(t[0]) <= within[1]:
            return system.velocity(x, t, branches[-1])
        each = system.velocity(torch.cat([x] * count), torch.cat([t] * count), joined).chunk(count)
        v = each[0]
        for before, after, scale in zip(each[:-1], each[1:], scales, strict=True):
            v = v + scale * (after - before)
        return v

    return velocity
