"""One interface over autoencoders, and the decoding of large images in pieces."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from diptych.core.errors import UserError
from diptych.parts.part import Part

PIXELS_PER_PASS = 1024 * 1024
"""Images of a batch are decoded in slices of at most so many pixels, an image at least."""

OVERLAP = 4
"""Neighbouring tiles share one part in so many of a tile's side."""


class Autoencoder(Part, abc.ABC):
    """Images (B, 3, H, W) in [-1, 1] to normalised latents (B, C, H/f, W/f) and back; frozen, deterministic (the mode).

    channels: C. factor: f. tile: side in pixels of the squares that larger images are decoded in; None for whole
    images. Layers that look at a whole image (attention, group norms) then look at a tile, so that colours may differ
    a little from those of the whole image; the seams are blended over a quarter of a tile.
    """

    channels: int
    factor: int
    tile: int | None = None

    @abc.abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, C, H/f, W/f), scaled and shifted as the decoder expects. Runs without gradient."""

    @abc.abstractmethod
    def decode_pass(self, latents: Tensor) -> Tensor:
        """The inverse of `encode`, clamped to [-1, 1], of a batch at once. Runs without gradient."""

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode`, clamped to [-1, 1]; large batches in slices and, with `tile`, large images in tiles.

        Runs in the number format of the autoencoder's weights, whatever the decoder before it computed in.

        Raises:
            UserError: a tile that is no multiple of 4 f.
        """
        height, width = latents.shape[-2] * self.factor, latents.shape[-1] * self.factor
        tiled = self.tile is not None and max(height, width) > self.tile
        area = self.tile * self.tile if tiled and self.tile is not None else height * width
        count = max(1, PIXELS_PER_PASS // max(1, area))
        with torch.autocast(latents.device.type, enabled=False):
            images = [self._tiled(part) if tiled else self.decode_pass(part) for part in latents.split(count)]
        return images[0] if len(images) == 1 else torch.cat(images)

    def _tiled(self, latents: Tensor) -> Tensor:
        """Overlapping tiles, each weighted by linear ramps towards its inner edges; the weights sum to one."""
        assert self.tile is not None
        if self.tile < 1 or self.tile % (OVERLAP * self.factor):
            raise UserError(f"tile {self.tile}: must be a multiple of {OVERLAP * self.factor} for this autoencoder")
        side = self.tile // self.factor
        rows, columns = (tile_starts(length, side) for length in latents.shape[-2:])
        size = [length * self.factor for length in latents.shape[-2:]]
        image = latents.new_zeros(len(latents), 3, *size, dtype=torch.float32)
        total = image.new_zeros(size)
        for top in rows:
            for left in columns:
                piece = self.decode_pass(latents[..., top : top + side, left : left + side])
                piece = piece.float()
                down = ramp(piece.shape[-2], top == rows[0], top == rows[-1], self.tile // OVERLAP, piece)
                across = ramp(piece.shape[-1], left == columns[0], left == columns[-1], self.tile // OVERLAP, piece)
                weight = down[:, None] * across
                y, x = top * self.factor, left * self.factor
                image[..., y : y + piece.shape[-2], x : x + piece.shape[-1]] += piece * weight
                total[y : y + piece.shape[-2], x : x + piece.shape[-1]] += weight
        return (image / total).to(latents.dtype)


def tile_starts(length: int, side: int) -> list[int]:
    """Where tiles of this side begin along a length, in latent pixels; the last one ends with the length."""
    if length <= side:
        return [0]
    step = side - side // OVERLAP
    return [*range(0, length - side, step), length - side]


def ramp(length: int, first: bool, last: bool, overlap: int, like: Tensor) -> Tensor:
    """Weights (length,) of a tile's pixels along a side: one, and rising from nearly zero over each inner edge."""
    weights = torch.ones(length, dtype=like.dtype, device=like.device)
    rising = (torch.arange(min(overlap, length), dtype=like.dtype, device=like.device) + 0.5) / overlap
    if not first:
        weights[: len(rising)] *= rising
    if not last:
        weights[-len(rising) :] *= rising.flip(0)
    return weights
