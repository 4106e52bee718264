"""Vision features of labelled images: a map by t-SNE, and how well a line tells the classes apart.

Source: Yu et al., Semantic Generative Tuning, App. 7.5 and Fig. 11: all vision tokens of an image flattened into one
vector, PCA to 50 dimensions, t-SNE with perplexity 30.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diptych.core.errors import UserError
from diptych.core.sample import Message
from diptych.data.folder import FolderSource
from diptych.data.source import ItemDraws
from diptych.inference.engine import Engine
from diptych.toyworld.render import render
from diptych.toyworld.scene import Scene, generator

DIMENSIONS = 50
PERPLEXITY = 30.0
FOLDS = 5
Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Labelled:
    """Images (3, H, W) of one size in [-1, 1], and the class of each."""

    images: list[Tensor]
    labels: list[str]

    @property
    def classes(self) -> list[str]:
        return sorted(set(self.labels))


def toy_images(count: int, size: int, seed: int = 0) -> Labelled:
    """Toy scenes of two objects, labelled by the shape that is the larger, and so the nearer, of them."""
    images: list[Tensor] = []
    labels: list[str] = []
    for number in range(count):
        scene = Scene.random(generator("features", seed, number), 2)
        images.append(render(scene, size))
        labels.append(scene.depth_order()[0].shape)
    return Labelled(images, labels)


def folder_images(folder: str | Path, size: tuple[int, int], limit: int | None = None) -> Labelled:
    """The images of a folder that has one folder for each class; at most `limit` of each class.

    Raises:
        UserError: fewer than two classes.
    """
    source = FolderSource(folder)
    kept: dict[str, list[int]] = {}
    for index, path in enumerate(source.paths):
        if len(parts := Path(path).parts) > 1:
            kept.setdefault(parts[0], []).append(index)
    if len(kept) < 2:
        raise UserError(f"{folder}: needs a folder of images for each of at least two classes, has {len(kept)}")
    images: list[Tensor] = []
    labels: list[str] = []
    for name, indices in sorted(kept.items()):
        for index in indices[:limit]:
            image = source.load(index, ItemDraws(0), size).image
            assert image is not None
            images.append(image)
            labels.append(name)
    return Labelled(images, labels)


@torch.no_grad()
def extract(
    engine: Engine, images: Sequence[Tensor], progress: Callable[[int, int], None] | None = None
) -> NDArray[np.float32]:
    """Vision tokens of each image, flattened, (images, tokens x width): what the part `vision` gives when the model is
    asked about the image.

    Raises:
        UserError: a model without a vision tower, or images that give different numbers of tokens.
    """
    system = engine.system
    parts = system.named_parts()
    if "vision" not in parts:
        raise UserError(f"{engine.name}: has no part 'vision'; it has {', '.join(parts)}")
    rows: list[Tensor] = []
    known: dict[bytes, Tensor] = {}
    question = [Message(role="user", text="<image>\ndescribe the image.")]
    for number, image in enumerate(images):
        digest = hashlib.blake2b(image.cpu().numpy().tobytes()).digest()
        if digest not in known:
            with _last_output(parts["vision"]) as seen:
                system.generate_text([question], [[image.to(system.device)]], max_new_tokens=1)
            if not seen:
                raise UserError(f"{engine.name}: its vision tower was not run on image {number + 1}")
            known[digest] = seen[-1].detach().flatten().float().cpu()
        rows.append(known[digest])
        if len(rows[-1]) != len(rows[0]):
            raise UserError(f"image {number + 1} gives {len(rows[-1])} numbers, the first {len(rows[0])}; use one size")
        if progress is not None:
            progress(number + 1, len(images))
    return torch.stack(rows).numpy()


@contextmanager
def _last_output(part: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what a part gives: of a list of modules, what each of them gives, the last one last."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append(output)
        elif isinstance(output, tuple) and isinstance(output[0], Tensor):
            outputs.append(output[0])
        elif isinstance(states := getattr(output, "last_hidden_state", None), Tensor):
            outputs.append(states)

    modules = list(part.modules()) if isinstance(part, nn.ModuleList) else [part]
    modules = [module for module in modules if not isinstance(module, nn.ModuleList)]
    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def plane(features: Floats, seed: int = 0) -> Floats:
    """Features (n, D) on a plane, (n, 2): PCA to 50, then t-SNE.

    Raises:
        UserError: too few images for the perplexity.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(features) <= PERPLEXITY:
        raise UserError(f"{len(features)} images are too few: t-SNE of perplexity {PERPLEXITY:g} needs more than that")
    reduced = PCA(min(DIMENSIONS, *features.shape), random_state=seed).fit_transform(features)
    return TSNE(2, perplexity=PERPLEXITY, random_state=seed).fit_transform(reduced)


def probe(features: Floats, labels: Sequence[str], seed: int = 0) -> dict[str, float]:
    """Accuracy of a linear classifier (PCA to 50, standardised, logistic regression; all fitted within each fold) on
    held-out fifths: `mean` and `deviation` over the folds, and `chance`, the share of the largest class.

    Raises:
        UserError: a class with fewer than five images.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    counts = {name: list(labels).count(name) for name in set(labels)}
    if len(counts) < 2 or min(counts.values()) < FOLDS:
        raise UserError(f"a probe needs two classes of at least {FOLDS} images each, not {counts}")
    test_count = len(labels) // FOLDS + 1
    model = make_pipeline(
        PCA(min(DIMENSIONS, len(labels) - test_count, features.shape[1]), random_state=seed),
        StandardScaler(),
        LogisticRegression(max_iter=2000),
    )
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    scores = cross_val_score(model, features, list(labels), cv=folds)
    return {
        "mean": float(scores.mean()),
        "deviation": float(scores.std()),
        "chance": max(counts.values()) / len(labels),
    }
