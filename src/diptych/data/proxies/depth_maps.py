"""Depth maps made with two estimators, and kept where they agree (Yu et al., Semantic Generative Tuning, App. 7.1).

The relative one (Depth Anything V2) gives the map; the metric one (DepthPro) is only asked whether it sees the same.

H, W height and width of a picture in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from diptych.core.draws import key
from diptych.core.errors import UserError
from diptych.core.files import write_file
from diptych.data.folder import FolderSource
from diptych.data.imaging import read_image
from diptych.data.source import BadItem

RELATIVE = "depth-anything/Depth-Anything-V2-Large-hf"
METRIC = "apple/DepthPro-hf"
MAX_DISCREPANCY = 0.4
"""Discrepancy above which a picture is left out. The paper gives the number and not the measure; ours is
`discrepancy`."""
FARTHEST = 1e-4
"""Least inverse distance, in 1 / m: what is farther than 10 km counts as so far."""

Plane = NDArray[np.float32]
Estimator = Callable[[Image.Image], Plane]
"""A picture to a map (H, W) of its size."""


def estimator(model: str | Path, device: str = "cpu") -> Estimator:
    """A depth model of transformers, by folder or hub id; UserError when it cannot be read, or when a library that it
    needs is missing (DepthPro's processor needs torchvision). Its weights are float32 whatever the checkpoint holds."""
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    try:
        processor = AutoImageProcessor.from_pretrained(str(model), trust_remote_code=False)
        network = AutoModelForDepthEstimation.from_pretrained(
            str(model), trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{model}: no depth model of transformers ({error})") from error
    network = network.to(device).eval()

    @torch.no_grad()
    def estimate(image: Image.Image) -> Plane:
        inputs = processor(images=image, return_tensors="pt").to(device)
        sizes = [(image.height, image.width)]
        [depth] = processor.post_process_depth_estimation(network(**inputs), target_sizes=sizes)
        return depth["predicted_depth"].float().cpu().numpy()

    return estimate


def discrepancy(nearness: Plane, distance: Plane) -> float:
    """How badly a relative map explains a metric one, from 0 (wholly) to 1 (not at all).

    The relative map, which is nearness up to scale and shift, is fitted by least squares to the inverse distance; the
    result is the root mean square of what is left over the spread of the inverse distance.
    """
    if nearness.shape != distance.shape:
        raise UserError(f"depth maps of two sizes: {nearness.shape} and {distance.shape}")
    wanted = np.maximum(1 / np.maximum(distance.astype(np.float64).ravel(), 1e-6), FARTHEST)
    given = np.stack([nearness.astype(np.float64).ravel(), np.ones(nearness.size)], axis=1)
    solution = np.linalg.lstsq(given, wanted, rcond=None)[0]
    spread = wanted.std()
    left = np.sqrt(np.mean((given @ solution - wanted) ** 2))
    if spread <= 1e-9 * abs(wanted.mean()):
        return 0.0
    return float(left / spread)


def make(
    pictures: str | Path,
    output: str | Path,
    *,
    relative: Estimator,
    metric: Estimator,
    max_discrepancy: float = MAX_DISCREPANCY,
    count: int | None = None,
    seed: int = 0,
) -> dict[str, str]:
    """Write a 16-bit PNG for every picture of a folder on which both estimators agree; go on where it was stopped.

    Args:
        output: a folder apart from the pictures. Maps have the pictures' names.
        max_discrepancy: the greatest `discrepancy` of maps that are kept.
        count: stop when there are as many maps: pictures that were left out are replaced by the next ones.
        seed: pictures are tried in the order in which a source of proxies with this seed draws them (`SomePictures`),
            so that `count` maps are those of the `count` pictures that the other proxies use, but for those left out.

    Returns:
        What was left out: path to reason.

    Raises:
        UserError: `output` lies among the pictures, or `count` maps cannot be had.
    """
    listed = FolderSource(pictures, task="image")
    if Path(output).expanduser().resolve().is_relative_to(listed.folder.resolve()):
        raise UserError(f"{output}: lies among the pictures, where maps would be taken for some; choose another folder")
    left_out = dict(listed.dropped)
    made = 0
    for path in sorted(listed.paths, key=lambda path: key(seed, path)):
        if made == count:
            return left_out
        target = Path(output).expanduser() / Path(path).with_suffix(".png")
        if target.is_file():
            made += 1
            continue
        try:
            image = read_image(listed.folder / path, path)
        except BadItem as bad:
            left_out[path] = bad.reason
            continue
        plane = relative(image)
        apart = discrepancy(plane, metric(image))
        if not apart <= max_discrepancy:
            left_out[path] = f"the estimators disagree ({apart:.2f}, at most {max_discrepancy})"
            continue
        low, high = float(plane.min()), float(plane.max())
        scaled = (plane - low) / (high - low) if high > low else np.zeros_like(plane)
        picture = Image.fromarray(np.rint(scaled * 65535).astype(np.uint16))
        write_file(target, lambda temporary, picture=picture: picture.save(temporary, "PNG"))
        made += 1
    if count is not None and made < count:
        raise UserError(f"{pictures}: {made} of {count} maps made, {len(left_out)} pictures left out; add pictures")
    return left_out
