from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.core.errors import UserError
from diptych.toyworld.confusions import confusions
from diptych.toyworld.detector import detect
from diptych.toyworld.render import boxes, render
from diptych.toyworld.scene import COLOURS, Scene, generator
from diptych.toyworld.shapes import SHAPES


@given(st.integers(0, 2**40), st.sampled_from([32, 64]))
@settings(max_examples=60, deadline=None)
def test_reads_renders_exactly(seed: int, size: int) -> None:
    scene = Scene.random(generator(seed))
    reading = detect(render(scene, size))
    assert reading.background == scene.background
    assert len(reading.detections) == len(scene.objects)
    for found, box in zip(scene.objects, boxes(scene, size), strict=True):
        near = min(reading.detections, key=lambda one: float((torch.tensor(one.box) - box).abs().max()))
        assert (near.shape, near.colour) == (found.shape, found.colour)
        assert (torch.tensor(near.box) - box).abs().max() < size / 32
    scores = [one.score for one in reading.detections]
    assert scores == sorted(scores, reverse=True)
    assert 0.9 < scores[-1] <= scores[0] <= 1.0001


def test_confusions_are_diagonal() -> None:
    table = confusions(150)
    assert table.shapes[:, :-1].trace() == table.objects
    assert table.colours[:, :-1].trace() == table.objects
    assert table.backgrounds[:, :-1].trace() == 150
    assert (table.missed, table.extra, table.exact) == (0, 0, 1.0)
    assert table.shapes.shape == (len(SHAPES), len(SHAPES) + 1)
    assert table.colours.shape == (len(COLOURS), len(COLOURS) + 1)


def test_confusions_count_what_goes_wrong() -> None:
    table = confusions(40, noise=0.45)
    assert table.missed > 0
    assert table.exact < 1
    assert table.shapes.sum() == table.objects == table.colours.sum()
    assert table.shapes[:, -1].sum() == table.missed


def test_slight_noise_and_blur_are_tolerated() -> None:
    assert confusions(60, noise=0.1).exact >= 0.98
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    right = 0
    for index in range(60):
        scene = Scene.random(generator("blur", index))
        padded = torch.nn.functional.pad(render(scene)[None], (1, 1, 1, 1), mode="replicate")
        reading = detect(torch.nn.functional.conv2d(padded, kernel, groups=3)[0])
        read = sorted((one.shape, one.colour) for one in reading.detections)
        right += read == sorted((found.shape, found.colour) for found in scene.objects)
    assert right >= 57


@pytest.mark.parametrize("size", [32, 64])
def test_finds_nothing_in_noise_and_in_plain_images(size: int) -> None:
    rng = torch.Generator().manual_seed(0)
    for _ in range(40):
        coarse = torch.randn(1, 3, 8, 8, generator=rng)
        for image in (
            torch.randn(3, size, size, generator=rng),
            torch.rand(3, size, size, generator=rng) * 2 - 1,
            0.3 * torch.randn(3, size, size, generator=rng),
            torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")[0],
            (torch.rand(3, 1, 1, generator=rng) * 2 - 1).expand(3, size, size),
        ):
            assert detect(image).detections == ()
    assert detect(torch.randn(3, size, size, generator=rng)).background is None


def paint(mask: torch.Tensor, rgb: tuple[int, int, int]) -> torch.Tensor:
    """A gray image with a mask painted over it."""
    colour = torch.tensor(rgb).float() / 127.5 - 1
    return torch.where(mask, colour[:, None, None], torch.tensor(0.0))


def test_rejects_foreign_outlines_sizes_and_colours() -> None:
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    disc = x.square() + y.square() < 25
    assert [one.shape for one in detect(paint(disc, COLOURS["red"])).detections] == ["circle"]
    red = COLOURS["red"]
    assert not detect(paint((x.abs() < 6) & (y.abs() < 3), red)).detections  # a bar
    assert not detect(paint(disc & (x.square() + y.square() > 8), red)).detections  # a ring
    assert not detect(paint((x.square() + y.square() < 64) & (y > 0), red)).detections  # half a disc
    assert not detect(paint(x.square() + y.square() < 100, red)).detections  # too large
    assert not detect(paint(x.square() + y.square() < 6, red)).detections  # too small
    assert not detect(paint(disc, (110, 20, 130))).detections  # no colour of the palette


def test_touching_shapes_are_cut_apart() -> None:
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    pair = ((x - 5).square() + y.square() < 27) | ((x + 5).square() + y.square() < 27)
    assert len(detect(paint(pair, COLOURS["blue"])).detections) == 2


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"\(32, 32\)"):
        detect(torch.zeros(32, 32))
