"""What holds for every picture: sizes, seeds, masks, bandwidth, ranges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diptych.core.errors import UserError
from diptych.data.proxies import degradations, perception
from diptych.data.proxies.annotated import Annotated, Segment, View, crop_box, extent, stacked, view
from diptych.data.proxies.pictures import ToyPictures, annotated
from diptych.data.proxies.source import ProxySource
from diptych.data.proxies.tasks import MIXTURES, PROXIES, shares
from diptych.data.source import ItemDraws
from diptych.toyworld.render import masks
from diptych.toyworld.scene import Scene, generator

SIDES = st.integers(16, 72)
SEEDS = st.integers(0, 2**32)


def random_view(height: int, width: int, seed: int) -> View:
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
    mask = np.zeros((height, width), dtype=bool)
    mask[: height // 2, : width // 2] = True
    things = (Segment(mask=mask, category=3, name="dog"), Segment(mask=~mask, category=9, name="sky", thing=False))
    plane = rng.random((height, width), dtype=np.float32)
    return view(Annotated(image=smooth, segments=things, depth=plane), (height, width), "x")


@given(height=SIDES, width=SIDES, seed=SEEDS, proxy=st.sampled_from(sorted(PROXIES)))
@settings(max_examples=60, deadline=None)
def test_sizes_kept_and_seeds_reproduce(height: int, width: int, seed: int, proxy: str) -> None:
    seen = random_view(height, width, seed % 100)
    before = seen.image.copy()
    make = PROXIES[proxy].make
    source, target = make(seen, np.random.default_rng(seed))
    again = make(seen, np.random.default_rng(seed))
    assert source.shape == target.shape == (height, width, 3)
    assert source.dtype == target.dtype == np.uint8
    assert np.array_equal(source, again[0])
    assert np.array_equal(target, again[1])
    assert np.array_equal(seen.image, before), "the picture itself was changed"
    assert np.array_equal(source, before) or np.array_equal(target, before), "one side is the picture as it is"


@given(seed=SEEDS, size=st.integers(16, 64))
@settings(max_examples=40, deadline=None)
def test_masks_cover_exactly_the_annotation(seed: int, size: int) -> None:
    scene = Scene.random(generator("proxies", seed))
    known = annotated(scene, size)
    seen = view(known, (size, size), "x")
    planes = masks(scene, size).numpy()
    for number, plane in enumerate(planes, 1):  # objects of a scene do not overlap
        assert np.array_equal(seen.labels == number, plane)
    rng = np.random.default_rng(seed)
    instance = perception.instance(seen, rng)
    assert np.array_equal(instance.any(axis=2), planes.any(axis=0))
    colours = [set(map(tuple, instance[plane])) for plane in planes]
    assert all(len(found) == 1 for found in colours)
    assert len(set.union(*colours)) == len(planes), "two objects have one colour"
    semantic = perception.semantic(seen, rng)
    for segment, plane in zip(known.segments, planes, strict=False):
        assert set(map(tuple, semantic[plane])) == {perception.category_colour(segment.category)}


@given(height=st.integers(24, 64), width=st.integers(24, 64), seed=SEEDS, factor=st.sampled_from(degradations.FACTORS))
@settings(max_examples=60, deadline=None)
def test_super_resolution_has_no_more_bandwidth_than_its_factor_allows(
    height: int, width: int, seed: int, factor: int
) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    low = degradations.resampled(noise, factor)
    kept = min(-(-height // factor), -(-width // factor))
    rounding = 0.5 * np.sqrt(height * width) + 1e-6  # the most that rounding to levels can add to a singular value
    for channel in range(3):
        values = np.linalg.svd(low[..., channel].astype(float), compute_uv=False)
        assert (values[kept:] <= rounding).all()
    assert np.linalg.svd(noise[..., 0].astype(float), compute_uv=False)[kept] > rounding  # the picture itself has more


@given(length=st.sampled_from(degradations.BLURS), degrees=st.floats(0, 360))
@settings(max_examples=40, deadline=None)
def test_motion(length: int, degrees: float) -> None:
    kernel = degradations.line_kernel(length, degrees)
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    assert (kernel >= 0).all()
    assert kernel.shape[0] - length in (0, 1)
    assert np.abs(kernel - kernel[::-1, ::-1]).max() < 0.02  # the same back and forth: brightness does not wander


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_low_light_and_haze_keep_their_ranges(seed: int) -> None:
    grey = np.full((32, 32, 3), 200, dtype=np.uint8)
    dark = degradations.darkened(grey, np.random.default_rng(seed))
    assert 0.1 * 200 - 2 <= dark.mean() <= 0.5 * 200 + 2
    assert dark.std() <= 0.05 * 255
    haze = degradations.hazed(np.zeros((32, 32, 3), dtype=np.uint8), np.random.default_rng(seed))
    assert 0 < haze.min() <= haze.max() <= 255
    assert haze[0].mean() > haze[-1].mean(), "what is far is above"


def test_every_kind_of_noise_is_used() -> None:
    grey = np.full((24, 24, 3), 128, dtype=np.uint8)
    made = [degradations.noised(grey, np.random.default_rng(seed)) for seed in range(40)]
    assert sum((one == 0).all(axis=2).any() for one in made) > 5, "specks"
    assert len({one.tobytes() for one in made}) > 30


@given(
    picture=st.tuples(st.integers(8, 300), st.integers(8, 300)), size=st.tuples(st.integers(8, 90), st.integers(8, 90))
)
@settings(deadline=None)
def test_crop(picture: tuple[int, int], size: tuple[int, int]) -> None:
    left, top, right, bottom = crop_box(picture, size)
    assert left >= -1e-9
    assert top >= -1e-9
    assert right <= picture[0] + 1e-6
    assert bottom <= picture[1] + 1e-6
    assert (right - left) / (bottom - top) == pytest.approx(size[1] / size[0], rel=1e-6)
    assert left + right == pytest.approx(picture[0])


def test_small_segments_lie_on_large_ones() -> None:
    large, small = np.ones((6, 6), dtype=bool), np.zeros((6, 6), dtype=bool)
    small[2:4, 1:3] = True
    for order in ((small, large), (large, small)):
        labels = stacked([Segment(mask=mask) for mask in order], (6, 6))
        which = 1 + [mask is small for mask in order].index(True)
        assert np.array_equal(labels == which, small)
    assert extent(small) == (1, 2, 3, 4)


def test_boxes_follow_the_crop() -> None:
    mask = np.zeros((40, 80), dtype=bool)
    mask[10:20, 30:50] = True
    known = Annotated(image=Image.new("RGB", (80, 40)), segments=(Segment(mask=mask, name="x"),))
    seen = view(known, (20, 20), "x")  # the middle 40 columns, at half size
    assert seen.boxes == ((5, 5, 15, 10),)
    assert np.array_equal(np.flatnonzero(seen.labels.any(axis=0)), np.arange(5, 15))


def test_detection_draws_boxes() -> None:
    seen = random_view(64, 64, 0)
    drawn = perception.detection(seen, np.random.default_rng(0))
    changed = (drawn != seen.image).any(axis=2)
    colour = perception.category_colour(3)
    assert (drawn[31, :31] == colour).all(axis=1).mean() > 0.9, "its lower edge"
    assert not changed[33:, 33:].any(), "the sky is no object"


def test_depth_is_normalised() -> None:
    seen = random_view(32, 32, 1)
    drawn = perception.depth(seen, np.random.default_rng(0))
    assert (drawn.min(), drawn.max()) == (0, 255)
    assert (drawn[..., 0] == drawn[..., 2]).all()


def toy(proxies: object, seed: int = 0, name: str = "toy") -> ProxySource:
    assert isinstance(proxies, str | dict)
    return ProxySource(ToyPictures(count=400, seed=5), proxies=proxies, seed=seed, name=name)


def test_mixtures() -> None:
    source = toy({"mixed": 3, "edges": 1})
    assert source.shares == pytest.approx({"panoptic": 0.25, "reconstruction": 0.25, "edges": 0.5})
    drawn = [source.proxy(index).name for index in range(400)]
    assert drawn.count("edges") == pytest.approx(200, abs=40)
    assert drawn.count("panoptic") == pytest.approx(100, abs=35)
    assert set(shares("restoration", "x")) == set(MIXTURES["restoration"])


@pytest.mark.parametrize("proxies", ["denoising", "class_agnostic", "mixed"])
def test_a_sample_is_a_function_of_seed_and_picture(proxies: str) -> None:
    one, same, other = toy(proxies), toy(proxies), toy(proxies, seed=1)
    first, second = one.load(7, ItemDraws(1), (32, 32)), same.load(7, ItemDraws(1), (32, 32))
    assert first.image is not None
    assert second.image is not None
    assert first.task == "edit"
    assert torch.equal(first.image, second.image)
    assert torch.equal(first.context_images[0], second.context_images[0])
    assert first.text == second.text
    assert one.fingerprint(7) == same.fingerprint(7) != other.fingerprint(7)
    texts = {one.load(7, ItemDraws(visit), (16, 16)).text for visit in range(400)}
    assert texts == set(one.proxy(7).instructions)
    visits = [one.load(7, ItemDraws(visit), (16, 16)).image for visit in range(2)]
    assert visits[0] is not None
    assert visits[1] is not None
    assert torch.equal(visits[0], visits[1]), "the target may be cached, so a visit does not change it"


def test_instructions_are_short_and_varied() -> None:
    for proxy in PROXIES.values():
        assert len(set(proxy.instructions)) == len(proxy.instructions) >= 36
        longest = 20 if proxy.name == "reconstruction" else 13  # reconstruction asks for a description
        assert all(len(text.split()) <= longest for text in proxy.instructions)


@pytest.mark.parametrize(
    ("proxies", "message"),
    [
        ("segmentation", "unknown proxy 'segmentation'"),
        ({"edges": 0}, "the weight of 'edges' must be a number above 0, not 0"),
        ({}, "no proxy given"),
    ],
)
def test_wrong_mixtures(proxies: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        toy(proxies)
