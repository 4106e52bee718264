"""What representation alignment compares the decoder's states with: the MLLM's vision features of the image to make.

Where the MLLM reads that image for its condition (IOMM's images without a caption), the vision tower's tokens serve
both; all other images run in the same pass of the tower.

D MLLM width, N vision tokens of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from diptych.objectives.alignment import alignment_loss, resample_each
from diptych.parts.backbones.base import Backbone
from diptych.parts.backbones.processor import join_inputs
from diptych.parts.decoders.base import Decoder
from diptych.parts.decoders.packing import check_layer
from diptych.parts.decoders.projector import AlignmentProjector
from diptych.systems.base import trains
from diptych.systems.conditioned_inputs import Requests, Targets
from diptych.systems.presets import ComposedConfig


def build_projector(decoder: Decoder, backbone: Backbone, config: ComposedConfig) -> AlignmentProjector | None:
    """The projector of the alignment that a configuration asks for; None for none.

    Raises:
        UserError: a block that the decoder does not have.
    """
    if config.alignment is None:
        return None
    check_layer(decoder, config.alignment.layer)
    return AlignmentProjector(decoder.hidden, backbone.width, config.alignment.hidden)


def read_images(backbone: Backbone, requests: Requests, targets: Targets) -> tuple[Requests, list[Tensor]]:
    """Every image of a batch through the vision tower, once.

    Returns:
        The requests with the vision tokens of their images, and the features of each image to make, (D, rows, columns),
        without gradient.
    """
    inputs = requests.inputs
    images = [part for part in (None if inputs is None else inputs.vision, targets.features) if part is not None]
    with nullcontext() if trains(backbone) else torch.no_grad():
        made = backbone.vision_features(join_inputs(images)) if images else []
    shown: tuple[Tensor, ...] = ()
    if inputs is not None:
        count = 0 if inputs.vision is None else len(inputs.vision.grids)
        shown, made = (*made[:count], *inputs.features), made[count:]
        requests = replace(requests, inputs=replace(inputs, vision=None, features=shown))
    tokens = [*shown, *made, *targets.known]
    places = zip(targets.places, targets.grids, strict=True)
    return requests, [tokens[place].detach().T.unflatten(1, grid) for place, grid in places]


def alignment(
    projector: AlignmentProjector, states: Sequence[Tensor], features: Sequence[Tensor], rows: int, columns: int
) -> Tensor:
    """The loss (B,) of image tokens (rows * columns, W) of each sample against features (D, r, c)."""
    return alignment_loss(projector(torch.stack(list(states))), resample_each(features, rows, columns))
