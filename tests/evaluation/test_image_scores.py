"""Scores for data filters: which label is meant, LAION's heads, and that a model's own preprocessing is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diptych.core.errors import UserError
from diptych.evaluation.clip import Clip
from diptych.evaluation.image_scores import aesthetic_scorer, chosen_label, classifier_scorer, clip_scorer

PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)) for seed in (1, 2)
]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP with two labels, as watermark classifiers on the hub are."""
    from transformers import SiglipConfig, SiglipForImageClassification, SiglipImageProcessor

    folder = tmp_path_factory.mktemp("classifier") / "watermark"
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = SiglipConfig(
        text_config={**size, "vocab_size": 8}, vision_config={**size, "image_size": 16, "patch_size": 8}
    )
    config.id2label, config.label2id = {0: "No Watermark", 1: "Watermark"}, {"No Watermark": 0, "Watermark": 1}
    SiglipForImageClassification(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def test_the_probability_of_a_watermark(classifier: Path) -> None:
    wanted = classifier_scorer("watermark", str(classifier), option="--watermark", label="watermark")
    other = classifier_scorer("watermark", f"{classifier}:No Watermark", option="--watermark", label="watermark")
    scores = wanted.score(PICTURES, ["", ""])
    assert scores.shape == (2,)
    assert torch.allclose(scores + other.score(PICTURES, ["", ""]), torch.ones(2))
    assert torch.allclose(scores[:1], wanted.score(PICTURES[:1], [""]))
    assert scores[0] != scores[1]
    assert wanted.weights == other.weights


@pytest.mark.parametrize(
    ("labels", "wanted", "place"),
    [
        (["No Watermark", "Watermark"], "", 1),
        (["watermark", "no_watermark"], "", 0),
        (["clean", "with-watermark"], "", 1),
        (["a", "b"], "b", 1),
    ],
)
def test_the_label_that_is_meant(labels: list[str], wanted: str, place: int) -> None:
    assert chosen_label(labels, wanted, "watermark", "--watermark m") == place


@pytest.mark.parametrize(
    ("labels", "wanted", "says"),
    [
        (["yes", "no"], "", "which label is meant cannot be told; write it as m:LABEL. Labels: yes, no."),
        (["watermark big", "watermark small"], "", "cannot be told"),
        (["yes", "no"], "maybe", "no label 'maybe'. Labels: yes, no."),
    ],
)
def test_a_label_that_cannot_be_told(labels: list[str], wanted: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        chosen_label(labels, wanted, "watermark", "--watermark m")


def test_clip_scores_are_cosines(tiny_eyes: tuple[str, str]) -> None:
    _, folder = tiny_eyes
    clip, texts = Clip(folder), ["a red bench", "two cow"]
    a, b = clip.images(PICTURES).numpy().astype(np.float64), clip.texts(texts).numpy().astype(np.float64)
    wanted = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
    assert clip_scorer(folder).score(PICTURES, texts).numpy() == pytest.approx(wanted, abs=1e-5)


def test_laions_head_reads_the_normalised_vector(tiny_eyes: tuple[str, str], tmp_path: Path) -> None:
    _, folder = tiny_eyes
    torch.manual_seed(3)
    tensors = {
        "layers.0.weight": torch.randn(4, 8),
        "layers.0.bias": torch.randn(4),
        "layers.10.weight": torch.randn(1, 4),
    }
    save_file(tensors, tmp_path / "head.safetensors")
    vectors = Clip(folder).images(PICTURES).double()
    hidden = vectors / vectors.norm(dim=1, keepdim=True) @ tensors["layers.0.weight"].double().T
    wanted = ((hidden + tensors["layers.0.bias"]) @ tensors["layers.10.weight"].double().T)[:, 0]
    found = aesthetic_scorer(folder, tmp_path / "head.safetensors").score(PICTURES, ["", ""])
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    save_file({"weight": torch.randn(1, 5)}, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match="takes 5 numbers, not 8"):
        aesthetic_scorer(folder, tmp_path / "wide.safetensors")
