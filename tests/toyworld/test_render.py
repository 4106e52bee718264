from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.core.errors import UserError
from diptych.toyworld.render import FARTHEST, boxes, depth, edges, levels, masks, render
from diptych.toyworld.scene import Scene, Thing, generator, place
from diptych.toyworld.shapes import AREAS, DROPS, EXTENTS, SHAPES, Shape, coverage

scenes = st.integers(0, 2**40).map(lambda seed: Scene.random(generator(seed)))
sizes = st.sampled_from([32, 64])


@given(scenes, sizes)
@settings(max_examples=60, deadline=None)
def test_image_shows_palette_where_masks_say(scene: Scene, size: int) -> None:
    image = render(scene, size)
    assert image.shape == (3, size, size)
    assert image.dtype == torch.float32
    assert image.abs().max() <= 1
    shown = torch.from_numpy(levels(image))
    covered = masks(scene, size)
    assert covered.sum(0).max() <= 1
    for mask, found in zip(covered, scene.objects, strict=True):
        inner = -torch.nn.functional.max_pool2d(-mask.float()[None], 3, 1, 1)[0] > 0  # all eight neighbours inside
        assert inner.any()
        assert torch.allclose(shown[inner], torch.tensor(found.rgb, dtype=torch.float32), atol=0.01)
    assert torch.allclose(shown[0, 0], torch.tensor(scene.rgb, dtype=torch.float32), atol=0.01)


@given(scenes, sizes)
@settings(max_examples=60, deadline=None)
def test_boxes_are_tight(scene: Scene, size: int) -> None:
    for mask, box in zip(masks(scene, size), boxes(scene, size), strict=True):
        rows, columns = torch.where(mask)
        seen = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (seen - box).abs().max() <= 1.5 * size / 32  # the triangle's tip is thinner than half a pixel


@given(scenes)
@settings(max_examples=40, deadline=None)
def test_depth_and_edges(scene: Scene) -> None:
    plane, covered = depth(scene), masks(scene)
    assert plane[~covered.any(0)].eq(0).all()
    means = [float(plane[mask].mean()) for mask in covered]
    assert all(FARTHEST <= mean <= 1.0001 for mean in means)
    by_depth = sorted(zip(means, scene.objects, strict=True), key=lambda pair: -pair[0])
    assert [found for _, found in by_depth] == list(scene.depth_order())
    outline = edges(scene)
    assert (outline & ~covered.any(0)).sum() == 0
    for mask in covered:
        assert 0 < (outline & mask).sum() < mask.sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_area_extent_and_centre_of_mass_constants(shape: Shape) -> None:
    grid = (np.arange(800) + 0.5) / 100 - 4
    cover = coverage(shape, 0.0, 0.0, 3.0, grid, grid, 100)
    assert cover.sum() / 100**2 / 9 == pytest.approx(AREAS[shape], rel=2e-3)
    assert (cover.sum(1) @ grid) / cover.sum() / 3 == pytest.approx(DROPS[shape], abs=2e-3)
    rows, columns = np.where(cover > 0.5)
    assert np.ptp(columns) / 200 / 3 == pytest.approx(EXTENTS[shape][0], abs=0.01)
    assert np.ptp(rows) / 200 / 3 == pytest.approx(EXTENTS[shape][1], abs=0.01)


def test_silhouettes_differ_at_ten_pixels() -> None:
    drawn = {shape: masks(place(np.random.default_rng(0), [Thing(shape=shape)], cells=[0]))[0] for shape in SHAPES}
    for one in SHAPES:
        for two in SHAPES:
            if one != two:
                assert (drawn[one] ^ drawn[two]).sum() >= 15, (one, two)


def test_sizes_show_the_same_scene() -> None:
    scene = Scene.random(generator(5), 4)
    small = torch.nn.functional.avg_pool2d(render(scene, 64), 2)
    assert (small - render(scene, 32)).abs().mean() < 0.02


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="not 4"):
        render(Scene.random(generator(0)), 4)
    with pytest.raises(UserError, match=r"\(1, 32, 32\)"):
        levels(torch.zeros(1, 32, 32))
    with pytest.raises(UserError, match="not finite"):
        levels(torch.full((3, 32, 32), float("nan")))
