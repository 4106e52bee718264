"""Where OmniGen2's tokens stand: lengths of a padded batch and positions by (shift, row, column) (omni-RoPE, Sec. 3.2).

Text token k is at (k, k, k). An image's tokens are at (shift, row, column), rows and columns counted from 0 in every
image; the shift starts at the sample's own text length and grows by the longer side of each image that came before, so
that no two images share it. Reference images come first, the image to make last.

B samples, L text tokens, R reference tokens of one image, N tokens of the image to make, T tokens in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.core.errors import UserError
from diptych.core.host import upload

Grid = tuple[int, int]
"""Rows and columns of an image in tokens."""


@dataclass(frozen=True)
class Layout:
    """The shapes of a batch, sample by sample: text length, grids of the reference images, grid of the target."""

    text: tuple[int, ...]
    references: tuple[tuple[Grid, ...], ...]
    targets: tuple[Grid, ...]

    @property
    def sizes(self) -> list[list[int]]:
        """Of each sample: tokens of the text, of every reference image, of the target."""
        return [
            [length, *(rows * columns for rows, columns in (*grids, target))]
            for length, grids, target in zip(self.text, self.references, self.targets, strict=True)
        ]

    def positions(self) -> list[Tensor]:
        """Of every sample: text, reference images, target; each (T, 3) int64."""
        rows: list[Tensor] = []
        for length, grids, target in zip(self.text, self.references, self.targets, strict=True):
            shift, pieces = length, [torch.arange(length)[:, None].expand(length, 3)]
            for grid in (*grids, target):
                pieces.append(image_positions(shift, grid))
                shift += max(grid)
            rows.append(torch.cat(pieces))
        return rows

    def check(self, limits: Sequence[int], names: Sequence[str] = ()) -> None:
        """UserError for a sample that needs positions beyond `limits` (shift, row, column), naming what is too large.

        The tables of published weights end there: what lies beyond was never trained.

        Args:
            names: of the samples, for the message.
        """
        for sample, (length, grids, target) in enumerate(zip(self.text, self.references, self.targets, strict=True)):
            images = (*grids, target)
            needed = (
                length + sum(max(grid) for grid in grids) + 1,
                max(length, *(rows for rows, _ in images)),
                max(length, *(columns for _, columns in images)),
            )
            for axis, need, limit in zip(("shift", "row", "column"), needed, limits, strict=True):
                if need > limit:
                    name = names[sample] if names else f"sample {sample}"
                    shown = ", ".join(f"{rows}x{columns}" for rows, columns in images)
                    raise UserError(
                        f"{name}: {length} text tokens and images of {shown} tokens need {need} positions on the "
                        f"{axis} axis, the model has {limit}; shorten the text, or use fewer or smaller images"
                    )


def image_positions(shift: int, grid: Grid) -> Tensor:
    """(shift, row, column) in row-major order, (rows * columns, 3)."""
    rows, columns = grid
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.full_like(row, shift), row, column], dim=-1).reshape(-1, 3)


def real(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(B, longest) bool, True where a right-padded row of this length is real."""
    return upload(torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None], device)
