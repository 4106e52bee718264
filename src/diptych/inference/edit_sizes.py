"""The size of an edit: that of the image which it edits, by the rule that the system was published with, if any.

A request that says its size has that one; so has one with `size` among its options.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from diptych.systems.base import System

FACTOR = 2
"""An image whose area is within this factor of the usual one keeps its size; any other takes the usual area."""


def edit_size(system: System, images: Sequence[tuple[int, int]], usual: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the edit of images of these sizes.

    Of several images the one decides that the published pipeline takes (`System.edit_follows`): BAGEL's last, none with
    OmniGen2, and the first elsewhere, where nothing was published.

    Args:
        usual: (height, width) of what the model makes where nothing else says.
    """
    if not images or (system.edit_follows == "only" and len(images) > 1):
        return usual
    image = images[-1] if system.edit_follows == "last" else images[0]
    return system.edit_size(*image) or near(system, image, usual)


def near(system: System, image: tuple[int, int], usual: tuple[int, int]) -> tuple[int, int]:
    """The image's size in whole patches, for systems without a rule of their own: its shape, and its area where that is
    near the area that the model was trained at."""
    ratio = usual[0] * usual[1] / (image[0] * image[1])
    scale = 1.0 if 1 / FACTOR <= ratio <= FACTOR else math.sqrt(ratio)
    step = system.image_step
    if system.longest_side is not None:
        scale = min(scale, system.longest_side // step * step / max(image))
    height, width = (max(step, round(side * scale / step) * step) for side in image)
    return height, width
