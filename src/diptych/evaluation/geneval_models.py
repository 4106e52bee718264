"""GenEval's eyes: Mask2Former finds objects, CLIP names their colours.

The official detector runs in mmdet 2.x. This is the same architecture from transformers, read out in mmdet's way; its
weights are not identical, so results say `detector=hf-m2f`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from diptych.core.errors import UserError
from diptych.evaluation.clip import Clip
from diptych.evaluation.download import pinned_model
from diptych.evaluation.geneval import COLORS, overlap
from diptych.evaluation.scorers import load_scorer

# fmt: off
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis",
    "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)
# fmt: on
"""GenEval's names of COCO's 80 classes, by the detector's index; three differ from COCO's."""
SHORT, LONG, MULTIPLE, PROPOSALS = 800, 1333, 32, 100
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GROUND = "#999"


@dataclass(frozen=True, kw_only=True)
class Detection:
    """An object: class index, score, box (x0, y0, x1, y1) in pixels, mask (H, W) bool."""

    label: int
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray


class Detector:
    """Mask2Former for instances, from transformers.

    `seconds` counts the time inside the model, the rest being preparation and reading out. dtype: of the weights;
    float32 whatever the checkpoint holds.
    """

    def __init__(
        self,
        name: str,
        device: str = "cpu",
        short: int = SHORT,
        long: int = LONG,
        dtype: torch.dtype = torch.float32,
        *,
        allow_unpinned: bool = False,
    ) -> None:
        from transformers import Mask2FormerForUniversalSegmentation

        place, commit = pinned_model(name, "--detector", allow_unpinned=allow_unpinned)
        model: Any = load_scorer(
            Mask2FormerForUniversalSegmentation, place, f"--detector {name}", revision=commit, dtype=dtype
        )
        if model.config.num_labels != len(CLASSES):
            raise UserError(f"{name}: knows {model.config.num_labels} classes; GenEval needs COCO's {len(CLASSES)}")
        self.model: Any = model.to(device).eval()
        self.name, self.device, self.short, self.long = name, device, short, long
        self.seconds = 0.0
        self.dtype = dtype

    @torch.no_grad()
    def detect(self, pictures: Sequence[np.ndarray], threshold: float = 0.3) -> list[list[Detection]]:
        """Objects above `threshold` in pictures (H, W, 3) uint8, all of one size, as one batch; best first."""
        height, width = pictures[0].shape[:2]
        raw = torch.from_numpy(np.stack(pictures)).to(self.device).permute(0, 3, 1, 2).float()  # (B, 3, H, W)
        scale = min(self.short / min(height, width), self.long / max(height, width))
        inner = (int(height * scale + 0.5), int(width * scale + 0.5))
        x = F.interpolate(raw, inner, mode="bilinear", align_corners=False)
        x = (x - raw.new_tensor(MEAN)[:, None, None]) / raw.new_tensor(STD)[:, None, None]
        outer = tuple(-(-side // MULTIPLE) * MULTIPLE for side in inner)
        x = F.pad(x, (0, outer[1] - inner[1], 0, outer[0] - inner[0]))
        self._wait()
        begin = time.perf_counter()
        out = self.model(pixel_values=x.to(self.dtype))
        self._wait()
        self.seconds += time.perf_counter() - begin
        detections: list[list[Detection]] = []
        for classes, masks in zip(out.class_queries_logits, out.masks_queries_logits, strict=True):
            detections.append(read_out(classes, masks, outer, inner, (height, width), threshold))
        return detections

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


def read_out(
    classes: Tensor, masks: Tensor, outer: Sequence[int], inner: Sequence[int], size: Sequence[int], threshold: float
) -> list[Detection]:
    """Instances of one image from raw logits, as mmdet reads them.

    Args:
        classes: (Q, 81), the last for no object. masks: (Q, h, w).
        outer: padded input; inner: without padding; size: of the picture.
        threshold: of the score, class probability times the mean of the mask's sigmoid within the mask. The mean is
            below one, so masks are only formed where the probability alone is above.
    """
    probability = classes.float().softmax(-1)[:, :-1]  # (Q, 80)
    top, flat = probability.flatten().topk(min(PROPOSALS, probability.numel()))
    top, flat = top[top > threshold], flat[top > threshold]
    if not len(top):
        return []
    queries, labels = flat // probability.shape[1], flat % probability.shape[1]
    grown = F.interpolate(masks[queries][None].float(), tuple(outer), mode="bilinear", align_corners=False)
    grown = grown[..., : inner[0], : inner[1]]
    logits = F.interpolate(grown, tuple(size), mode="bilinear", align_corners=False)[0]  # (K, H, W)
    inside = logits > 0
    area = inside.sum((1, 2))
    certainty = (logits.sigmoid() * inside).sum((1, 2)) / area.clamp(min=1)
    scores = top * certainty
    order = scores.argsort(descending=True)
    kept = order[(scores[order] > threshold) & (area[order] > 0)]
    masks = inside[kept]
    (top_edge, bottom), (left, right) = ends(masks.any(2)), ends(masks.any(1))
    boxes = torch.stack([left, top_edge, right, bottom], 1).tolist()  # one transfer each, not one per object
    rows = zip(labels[kept].tolist(), scores[kept].tolist(), boxes, masks.cpu().numpy(), strict=True)
    return [
        Detection(label=label, score=score, box=(float(x0), float(y0), float(x1), float(y1)), mask=mask)
        for label, score, (x0, y0, x1, y1), mask in rows
    ]


def ends(lines: Tensor) -> tuple[Tensor, Tensor]:
    """Of lines (K, N) that hold something each, the first place that does and the one after the last, (K,) both."""
    return lines.int().argmax(1), lines.shape[1] - lines.flip(1).int().argmax(1)


class ColorNamer:
    """CLIP over ten colours, three templates each; objects stand on grey and are cropped to their boxes."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self._words: dict[str, Tensor] = {}

    def words(self, name: str) -> Tensor:
        """(10, D) unit vectors, one per colour."""
        if name not in self._words:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            vectors = F.normalize(self.clip.texts(texts), dim=-1).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self._words[name] = F.normalize(vectors.mean(1), dim=-1)
        return self._words[name]

    def name(self, crops: Sequence[Image.Image], names: Sequence[str]) -> list[str]:
        """The colour of each cut-out object of the given class; all crops in one batch."""
        if not crops:
            return []
        vectors = F.normalize(self.clip.images(crops), dim=-1)
        return [COLORS[int((self.words(name) @ vector).argmax())] for name, vector in zip(names, vectors, strict=True)]


def cut_out(picture: np.ndarray, detection: Detection) -> Image.Image:
    """An object on grey, cropped to its box."""
    image = Image.fromarray(picture)
    ground = Image.new("RGB", image.size, GROUND)
    left, top, right, bottom = detection.box
    shown = Image.composite(image, ground, Image.fromarray(detection.mask))
    return shown.crop((int(left), int(top), int(right), int(bottom)))


def self_test(detector: Detector) -> None:
    """Look at rendered signs, clocks and lights, and at an empty picture.

    Raises:
        UserError: none of the things is found where it was drawn, or something is seen in the empty picture; then the
            weights are not those of a working detector, and scores would mean nothing.
    """
    drawn = known_pictures()
    pictures = [picture for _, picture, _ in drawn]
    detections = detector.detect([*pictures, np.full_like(pictures[0], 128)])
    seen = [
        any(CLASSES[each.label] == name and overlap(each.box, box) > 0.5 for each in objects)
        for (name, _, box), objects in zip(drawn, detections, strict=False)
    ]
    ghosts = [CLASSES[each.label] for each in detections[-1] if each.score > 0.9]
    if not any(seen) or ghosts:
        names = ", ".join(name for name, _, _ in drawn)
        what = f"sees a {ghosts[0]} in an empty picture" if ghosts else f"finds none of: {names}"
        raise UserError(f"detector {detector.name} fails its self-test: it {what}; GenEval is not scored with it")


def known_pictures(side: int = 512) -> list[tuple[str, np.ndarray, tuple[float, float, float, float]]]:
    """Class, picture (side, side, 3) and box of simple things, drawn."""
    pictures: list[tuple[str, np.ndarray, tuple[float, float, float, float]]] = []
    for name in ("stop sign", "clock", "traffic light"):
        image = Image.new("RGB", (side, side), "#9fc5e8")
        pen = ImageDraw.Draw(image)
        pen.rectangle((0, side * 0.8, side, side), fill="#6b8e4e")
        middle, radius = side / 2, side * 0.28
        box = (middle - radius, middle - radius, middle + radius, middle + radius)
        if name == "stop sign":
            pen.rectangle((middle - 8, middle, middle + 8, side * 0.95), fill="#777777")
            pen.regular_polygon((middle, middle, radius), 8, rotation=22, fill="#c1121f", outline="white", width=8)
            pen.text((middle, middle), "STOP", fill="white", anchor="mm", font_size=side * 0.17)
        elif name == "clock":
            pen.ellipse(box, fill="white", outline="#222222", width=12)
            for hour in range(12):
                angle = 2 * np.pi * hour / 12
                at = (middle + 0.8 * radius * np.sin(angle), middle - 0.8 * radius * np.cos(angle))
                pen.text(at, str(hour or 12), fill="black", anchor="mm", font_size=side * 0.05)
            pen.line((middle, middle, middle, middle - 0.65 * radius), fill="black", width=8)
            pen.line((middle, middle, middle + 0.45 * radius, middle), fill="black", width=10)
        else:
            box = (middle - 0.42 * radius, middle - radius, middle + 0.42 * radius, middle + radius)
            pen.rectangle((middle - 8, middle, middle + 8, side * 0.95), fill="#444444")
            pen.rounded_rectangle(box, 20, fill="#1b1b1b")
            for place, color in zip((-0.6, 0.0, 0.6), ("#ff3b30", "#ffcc00", "#34c759"), strict=True):
                y = middle + place * radius
                pen.ellipse(
                    (middle - 0.25 * radius, y - 0.25 * radius, middle + 0.25 * radius, y + 0.25 * radius), fill=color
                )
        pictures.append((name, np.asarray(image), box))
    return pictures
