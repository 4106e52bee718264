"""Judges an edited image: was the instruction carried out, and was the rest left as it was."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.core.errors import UserError
from diptych.toyworld.confusions import in_cells
from diptych.toyworld.detector import detect
from diptych.toyworld.edits import Edit
from diptych.toyworld.render import render

TOLERANCE = 0.2
"""Most that an untouched pixel may differ in any channel, in [-1, 1]: a tenth of the range, 25.5 levels of 255."""


@dataclass(frozen=True, kw_only=True)
class EditVerdict:
    """success: the detector reads what the target shows where the edit acts. preserved: share in [0, 1] of the pixels
    that the edit should leave alone and that are within TOLERANCE of the source. reason: "" on success."""

    success: bool
    preserved: float
    reason: str = ""


def judge_edit(result: Tensor, edit: Edit) -> EditVerdict:
    """Judge a result (3, S, S) in [-1, 1].

    In each cell that the edit touches, the detector must read exactly what the target holds there: the one object by
    shape and colour, or nothing. A `background` edit succeeds when the background is read as the target's.
    """
    if result.ndim != 3 or result.shape[0] != 3 or result.shape[1] != result.shape[2]:
        raise UserError(f"an edited toy image has shape (3, S, S), not {tuple(result.shape)}")
    size = result.shape[-1]
    reading = detect(result)
    wrong: list[str] = []
    if edit.kind == "background" and reading.background != edit.target.background:
        wrong.append(f"expected a {edit.target.background} background, found {reading.background or 'no plain one'}")
    if edit.cells and reading.background is None:
        wrong.append("no plain background")
    by_cell = in_cells(reading.detections, size)
    for cell in edit.cells:
        wanted = edit.target.at(cell)
        expected = [f"{wanted.colour} {wanted.shape}"] if wanted else []
        contents = [f"{obj.colour} {obj.shape}" for obj in by_cell[cell]]
        if contents != expected:
            wrong.append(f"expected {expected or 'nothing'} in cell {cell}, found {contents or 'nothing'}")
    source = render(edit.source, size)
    kept = untouched(edit, size)
    close = (result.detach().cpu().float() - source).abs().amax(0) <= TOLERANCE
    preserved = float(close[kept].float().mean())
    return EditVerdict(success=not wrong, preserved=preserved, reason="; ".join(wrong))


def untouched(edit: Edit, size: int = 32) -> Tensor:
    """Pixels that the edit should leave alone, bool (size, size).

    They are a pixel or more away from all that it changes; where the whole background changes, they are the pixels
    that an object covers wholly.
    """
    changed = ((render(edit.source, size) - render(edit.target, size)).abs() > 1e-4).any(0)
    if edit.kind == "background":
        return ~changed
    return torch.nn.functional.max_pool2d(changed[None].float(), 3, 1, 1)[0] == 0
