"""Scores of single images for data filters: watermark, aesthetic and CLIP, by models of transformers.

Sources: HieraQuery, Sec. 4.1 (watermark and CLIP; neither model is named); Ovis-U1, Sec. 3.1 (aesthetic). The aesthetic
head is that of LAION's predictors: linear layers, one after the other, on CLIP's normalised image vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diptych.core.errors import UserError
from diptych.evaluation.clip import Clip
from diptych.evaluation.download import pinned_model
from diptych.evaluation.scorers import load_scorer

Scores = Callable[[Sequence[Image.Image], Sequence[str]], Tensor]
"""Images and their captions to one number each, (B,) float32."""


class ImageScorer:
    """A model that gives one number an image.

    name: of the score. model: as the user named it. weights: a digest of them. score: what gives the numbers.
    captions: whether these are looked at.
    """

    def __init__(self, name: str, model: str, network: torch.nn.Module, score: Scores, captions: bool = False) -> None:
        self.name, self.model, self.score, self.captions = name, model, score, captions
        digest = hashlib.blake2b(digest_size=16)
        for key, tensor in sorted(network.state_dict().items()):
            digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        self.weights = digest.hexdigest()


def clip_scorer(model: str, device: str = "cpu", *, allow_unpinned: bool = False) -> ImageScorer:
    """The cosine of a picture and its caption (CLIPScore is 100 times that); a CLIP model's folder or hub id.

    Raises:
        UserError: no such model, or a hub id without a commit.
    """
    clip = Clip(model, device, allow_unpinned=allow_unpinned)

    def score(images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        return torch.cosine_similarity(clip.images(images), clip.texts(texts)).float().cpu()

    return ImageScorer("clip", model, clip.model, score, captions=True)


def classifier_scorer(
    name: str, model: str, device: str = "cpu", *, option: str, label: str, allow_unpinned: bool = False
) -> ImageScorer:
    """What an image classifier of transformers says: the probability of `label`, or its output where it has but one.

    Args:
        name: of the score. model: folder or hub id, whose label may follow after ":" (owner/name:LABEL).
        option: the option that names it, for errors. label: looked for among its labels where none is given: the one
            that holds this word, and not "no", "not" or "without" before it.

    Raises:
        UserError: no such model, a label that it has not, or none that fits.
    """
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    place, _, wanted = model.partition(":")
    folder, commit = pinned_model(place, option, allow_unpinned=allow_unpinned)
    processor: Any = load_scorer(AutoImageProcessor, folder, f"{option} {place}", revision=commit)
    network: Any = load_scorer(
        AutoModelForImageClassification, folder, f"{option} {place}", revision=commit, dtype=torch.float32
    )
    network = network.to(device).eval()
    labels: list[str] = [str(network.config.id2label[number]) for number in range(network.config.num_labels)]
    chosen = 0 if len(labels) == 1 and not wanted else chosen_label(labels, wanted, label, f"{option} {place}")

    @torch.no_grad()
    def score(images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        pixels = processor(images=list(images), return_tensors="pt").to(device)
        logits = network(**pixels).logits.float()  # (B, labels)
        return (logits[:, 0] if len(labels) == 1 else logits.softmax(-1)[:, chosen]).cpu()

    return ImageScorer(name, model, network, score)


def chosen_label(labels: Sequence[str], wanted: str, word: str, where: str) -> int:
    """The place of a label by its name, or by a word in it; UserError where none or several fit."""
    listed = ", ".join(labels)
    if wanted:
        if wanted not in labels:
            raise UserError(f"{where}: no label {wanted!r}. Labels: {listed}.")
        return labels.index(wanted)
    spaced = [f" {text.lower().replace('_', ' ').replace('-', ' ')} " for text in labels]
    fits = [
        place
        for place, text in enumerate(spaced)
        if word in text and not any(f" {no} " in text for no in ("no", "not", "non", "without"))
    ]
    if len(fits) != 1:
        raise UserError(
            f"{where}: which label is meant cannot be told; write it as {where.split()[-1]}:LABEL. Labels: {listed}."
        )
    return fits[0]


def aesthetic_scorer(
    model: str, head: str | Path | None, device: str = "cpu", *, allow_unpinned: bool = False
) -> ImageScorer:
    """LAION's aesthetic predictors: `model` is CLIP, `head` a safetensors file of linear layers on its image vector.
    Without a head, `model` is an image classifier.

    Raises:
        UserError: no such model or head, or a head of another width.
    """
    if head is None:
        return classifier_scorer(
            "aesthetic", model, device, option="--aesthetic", label="aesthetic", allow_unpinned=allow_unpinned
        )
    clip = Clip(model, device, allow_unpinned=allow_unpinned)
    width = int(clip.model.config.projection_dim)
    layers = head_layers(Path(head).expanduser(), width).to(device)

    @torch.no_grad()
    def score(images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        vectors = torch.nn.functional.normalize(clip.images(images), dim=-1)
        return layers(vectors)[:, 0].float().cpu()

    return ImageScorer("aesthetic", model, torch.nn.ModuleList([clip.model, layers]), score)


def head_layers(path: Path, width: int) -> torch.nn.Sequential:
    """Linear layers of a file, in the order of the numbers in their names, from `width` to 1."""
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(f"--aesthetic-head {path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"--aesthetic-head {path}: not a safetensors file ({error})") from error
    names = [name.removesuffix(".weight") for name in tensors if name.endswith("weight") and tensors[name].ndim == 2]
    names.sort(key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
    layers = torch.nn.Sequential()
    for name in names:
        weight = tensors[f"{name}.weight" if name != "weight" else name].float()
        bias = tensors.get(f"{name}.bias" if name != "weight" else "bias")
        if weight.shape[1] != width:
            raise UserError(f"--aesthetic-head {path}: layer {name!r} takes {weight.shape[1]} numbers, not {width}")
        layer = torch.nn.Linear(width, weight.shape[0], bias=bias is not None)
        layer.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias.float()})})
        layers.append(layer)
        width = weight.shape[0]
    if not len(layers) or width != 1:
        raise UserError(f"--aesthetic-head {path}: its linear layers do not end in one number")
    return layers.requires_grad_(False)
