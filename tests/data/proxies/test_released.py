"""Style `released` against golden numbers of the released SGT code: the same bytes from the same random numbers, the
same distributions from ours, the same samples from files; and that the target is what is supervised."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from diptych.core.image_sizes import AreaCap, SideRange
from diptych.core.sample import Sample
from diptych.data.imaging import read_image, to_pil, to_tensor
from diptych.data.mixture import Mixture
from diptych.data.proxies import perception, released
from diptych.data.proxies.annotated import Annotated, Segment, own_view
from diptych.data.proxies.coco import CocoPictures, Sa1bPictures
from diptych.data.proxies.palettes import THINGS, stuff_colour, stuff_colours
from diptych.data.proxies.pictures import FolderPictures, PairPictures
from diptych.data.proxies.source import ProxySource, resized
from diptych.data.proxies.tasks import PROXIES
from diptych.data.source import ItemDraws
from sgt_golden import ReplayedDice, SeededDice, arrays, facts

Levels = NDArray[np.uint8]
DEGRADATIONS, CASES = arrays("degradations"), facts("degradations")["cases"]
SAMPLES, SAMPLE_FACTS = arrays("samples"), facts("samples")
TARGET, VISION = SAMPLE_FACTS["transforms"]["target"], SAMPLE_FACTS["transforms"]["vision"]
WHOLE: Mapping[str, Callable[[Levels, released.Dice], Levels]] = {
    "denoise": released.noise, "super_resolution": released.low_resolution, "inpainting": released.holes,
    "deblur": released.motion_blur, "deblur.impulse": released.motion_blur, "low_light": released.low_light,
}  # fmt: skip
WEATHER = {"rain": released.rain, "fog": released.fog}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["key"])
def test_damage_is_the_releases(case: dict[str, Any]) -> None:
    image, dice = DEGRADATIONS[case["input"]], ReplayedDice(case)
    if case["name"].startswith("noise."):
        kind = case["name"].removeprefix("noise.").removesuffix("_out_of_range")
        values = image[..., ::-1].astype(np.float32)
        values = values / np.float32(255) if image.dtype == np.uint8 else values
        found: NDArray[Any] = released.NOISES[kind](values, dice)[..., ::-1]
        np.testing.assert_allclose(found, DEGRADATIONS[case["key"]], atol=1e-6)
    else:
        if case["name"] in WEATHER:  # the release draws rain or fog first, which is the choice between two proxies here
            dice.left.pop(0)
        found = {**WHOLE, **WEATHER}[case["name"]](image, dice)
        close(found, DEGRADATIONS[case["key"]], share=1e-3)
    assert not dice.left, "the release drew more"


def close(found: NDArray[Any], expected: NDArray[Any], share: float) -> None:
    """Equal, or one level apart on this share of the values."""
    assert found.shape == expected.shape
    apart = np.abs(found.astype(int) - expected.astype(int))
    assert apart.max(initial=0) <= 1
    assert (apart > 0).mean() <= share


# Distributions of our own draws

PROPERTIES = facts("properties")
COUNT = 400


class Counted(released.GeneratorDice):
    """Our draws, kept by what they are for."""

    def __init__(self, seed: int) -> None:
        super().__init__(np.random.default_rng(seed))
        self.found: dict[Any, Any] = {}

    def uniform(self, low: float, high: float) -> float:
        value = super().uniform(low, high)
        self.found[low, high] = value
        return value

    def choice(self, options: Any) -> Any:
        value = super().choice(options)
        self.found[tuple(options)] = value
        return value


def picture() -> Levels:
    """Smooth and noisy areas in about the contrast of a photograph."""
    rng = np.random.default_rng(3)
    height, width = PROPERTIES["picture"]["height"], PROPERTIES["picture"]["width"]
    rough = rng.integers(40, 216, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC))


def drawn(make: Callable[[Levels, released.Dice], Levels]) -> list[dict[Any, Any]]:
    rows: list[dict[Any, Any]] = []
    for seed in range(COUNT):
        dice = Counted(seed)
        rows.append({"result": make(picture(), dice), **dice.found})
    return rows


def shares_agree(rows: list[dict[Any, Any]], options: tuple[Any, ...], expected: Mapping[str, float]) -> None:
    values = [str(row[options]) for row in rows]
    assert set(values) <= set(expected)
    for name, share in expected.items():
        assert values.count(name) / len(values) == pytest.approx(share, abs=0.04 * np.sqrt(1500 / COUNT))


def quantiles_agree(
    values: list[float], span: tuple[float, float], expected: Mapping[str, Any], scale: float = 1
) -> None:
    for name in ("10", "25", "50", "75", "90"):
        got = float(np.percentile(values, int(name))) * scale
        width = (span[1] - span[0]) * scale
        assert abs(got - expected["quantiles"][name]) <= 0.05 * np.sqrt(1500 / COUNT) * width


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (61, 2), (5, 5), (301, 17)])
@pytest.mark.parametrize("name", released.DAMAGE)
def test_pictures_of_any_size_can_be_damaged(name: str, size: tuple[int, int]) -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        before = image.copy()
        made = released.DAMAGE[name](image, released.GeneratorDice(rng))
        assert made.dtype == np.uint8
        assert (made.shape == image.shape) or name == "super_resolution"
        assert np.array_equal(image, before)


def test_distributions_are_the_releases() -> None:
    tasks = PROPERTIES["tasks"]
    rows = drawn(released.low_resolution)
    shares_agree(rows, released.FACTORS, tasks["super_resolution"]["factor"])
    rows = drawn(released.motion_blur)
    shares_agree(rows, released.BLUR_SIZES, tasks["deblur"]["size"])
    rows = drawn(released.low_light)
    quantiles_agree([row[released.BRIGHTNESS] for row in rows], released.BRIGHTNESS, tasks["low_light"]["brightness"])
    quantiles_agree([row[released.DARK_SIGMA] for row in rows], released.DARK_SIGMA, tasks["low_light"]["sigma"])
    rows = drawn(released.rain)
    shares_agree(rows, released.STRENGTHS, tasks["weather"]["intensity"])
    rows = drawn(released.noise)
    names = {"gaussian": released.SIGMA, "photons": released.PHOTONS, "speck_amount": released.SPECKS}
    kinds = tasks["denoise"]["share_of_kind"]
    for key, kind in (("gaussian", "gaussian"), ("photons", "poisson"), ("speck_amount", "salt_pepper")):
        values = [row[names[key]] for row in rows if names[key] in row]
        assert len(values) / COUNT == pytest.approx(kinds[kind], abs=0.08)
        expected = tasks["denoise"]["gaussian_sigma_of_255" if key == "gaussian" else key]
        quantiles_agree(values, names[key], expected)
    untouched = np.mean([np.array_equal(row["result"], picture()) for row in rows])
    assert untouched == pytest.approx(tasks["denoise"]["number_of_kinds"]["0"], abs=0.03)


def test_coverage_of_inpainting_is_the_releases() -> None:
    grey = np.full((96, 128, 3), 127, np.uint8)
    assert grey.shape[:2] == (PROPERTIES["picture"]["height"], PROPERTIES["picture"]["width"])
    expected = PROPERTIES["tasks"]["inpainting"]
    rows = []
    for seed in range(COUNT):
        dice = Counted(seed)
        rows.append((float((released.holes(grey, dice) != 127).any(2).mean()), dice.found[released.INTENSITIES]))
    assert np.median([share for share, _ in rows]) == pytest.approx(
        expected["covered_share"]["quantiles"]["50"], abs=0.05
    )
    for intensity, found in expected["covered_by_intensity"].items():
        values = [share for share, drawn in rows if str(drawn) == intensity]
        assert np.median(values) == pytest.approx(found["quantiles"]["50"], abs=0.06)


# From files to samples

DAMAGED = {
    "denoise": ("denoising", "python"), "deblurring": ("deblurring", "numpy"), "enhance": ("low_light", "numpy"),
    "inpainting": ("inpainting", "numpy"), "super_resolution": ("super_resolution", "numpy"),
}  # fmt: skip


def released_sample(name: str) -> dict[str, Any]:
    [found] = [sample for sample in SAMPLE_FACTS["samples"] if sample["name"] == name]
    return found


def vision(image: Image.Image) -> Levels:
    """What the tower sees of a picture in the released settings."""
    rule = SideRange(longest=VISION[0], shortest=VISION[1], root=True)
    return np.asarray(resized(image, rule.fit(image.height, image.width, VISION[2]), stretch=True))


def target_rule() -> SideRange:
    return SideRange(longest=TARGET[0], shortest=TARGET[1])


def only(source: ProxySource) -> Sample:
    """The one sample of a source, with the size that a mixture of its own sizes gives it."""
    mixture = Mixture([(source, 1.0)], seed=0, batch=1, size=64, own_size=target_rule(), stride=TARGET[2])
    return mixture.batch(0).samples[0]


def levels(image: Any) -> Levels:
    return np.asarray(to_pil(image))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The fixtures' photograph and its ready targets, under one name in folders of their own."""
    ready: dict[str, Any] = {
        "photo": Image.fromarray(SAMPLES["photo"]),
        "sam190k": Image.fromarray(SAMPLES["smaller_mask"]),
        "panoptic": Image.fromarray(SAMPLES["panoptic_png"]),
        "edge": Image.fromarray(SAMPLES["edge_png"]),
        "detect": Image.fromarray(SAMPLES["box_picture"]),
    }
    palette = Image.fromarray(SAMPLES["stuff_index"])
    palette.putpalette(SAMPLES["stuff_palette"].ravel().tolist())
    ready["semantic"] = palette
    for name, image in ready.items():
        (tmp_path / name / "deep").mkdir(parents=True)
        image.save(tmp_path / name / "deep" / "1.png")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "proxy"),
    [("sam190k", "class_agnostic"), ("panoptic", "panoptic"), ("semantic", "semantic"), ("edge", "edges"),
     ("detect", "detection")],
)  # fmt: skip
def test_ready_pairs_give_the_releases_samples(name: str, proxy: str, files: Path) -> None:
    pictures = PairPictures(files / "photo", targets=files / name)
    sample = only(ProxySource(pictures, proxies=proxy, style="released", stretch=True))
    facts_ = released_sample(name)
    close(levels(sample.image), SAMPLES[facts_["target"]], share=5e-3)
    [seen] = sample.context_images
    assert np.array_equal(levels(seen), SAMPLES["photo"]), "the picture is given at its own size"
    close(vision(to_pil(seen)), SAMPLES[facts_["vision"]], share=5e-3)
    assert sample.text in PROXIES[proxy].instructions


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_comes_before_resizing(name: str, monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    proxy, scalars = DAMAGED[name]
    facts_ = released_sample(name)
    dice = SeededDice(facts_["seed"], scalars)
    monkeypatch.setattr(released, "GeneratorDice", lambda rng: dice)
    source = ProxySource(FolderPictures(files / "photo"), proxies=proxy, style="released", stretch=True)
    sample = only(source)
    close(vision(to_pil(sample.context_images[0])), SAMPLES[facts_["vision"]], share=5e-3)
    close(levels(sample.image), SAMPLES[facts_["target"]], share=5e-3)


def test_weather_is_rain_or_fog_of_the_release() -> None:
    facts_ = released_sample("derain")
    dice = SeededDice(facts_["seed"], "numpy")
    mode = dice.choice(["rain", "fog"])
    found = WEATHER[mode](SAMPLES["photo"], dice)
    close(vision(Image.fromarray(found)), SAMPLES[facts_["vision"]], share=5e-3)


def test_reconstruction_and_masks_of_any_mode(tmp_path: Path) -> None:
    transforms, described = arrays("transforms"), facts("transforms")
    for case in described["modes"]:
        image = Image.fromarray(transforms[case["in"]])
        if case["mode"] == "P":
            image.putpalette(case["palette"])
        path = tmp_path / f"{case['mode']}.png"
        image.save(path)
        assert np.array_equal(np.asarray(read_image(path, "x")), transforms[case["out"]])
    mask = Image.fromarray(transforms["mask"])
    target = resized(mask, transforms["mask.resized"].shape[:2], stretch=True)
    assert np.array_equal(np.asarray(target), transforms["mask.resized"])
    rule = described["mask"]
    size = SideRange(longest=rule["longest"], shortest=rule["shortest"]).fit(
        target.height, target.width, rule["stride"]
    )
    np.testing.assert_allclose(to_tensor(resized(target, size, stretch=True)), transforms["mask.target"], atol=1e-6)


def test_pixels_are_the_releases() -> None:
    transforms, described = arrays("transforms"), facts("transforms")
    picture_ = Image.fromarray(transforms["picture"])
    for case in described["pixels"]:
        rule = SideRange(longest=case["longest"], shortest=case["shortest"])
        size = rule.fit(picture_.height, picture_.width, case["stride"])
        found = to_tensor(resized(picture_, size, stretch=True))
        np.testing.assert_allclose(found, transforms[case["key"]], atol=1e-6)
    case = described["omnigen2_pixels"]
    rule = AreaCap(max_pixels=case["max_pixels"], max_side=case["max_side"])
    for image, key in ((case["input"], case["key"]), (case["mask"], case["mask_key"])):
        pixels = Image.fromarray(transforms[image])
        size = rule.fit(pixels.height, pixels.width, 16)
        found = to_tensor(resized(pixels, size, stretch=True, resample="lanczos"))
        np.testing.assert_allclose(found, transforms[key], atol=1e-6)


# Colours


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    """The same masks as COCO panoptic and instances files and as SA-1B's."""
    plain = facts("annotations")
    Image.fromarray(SAMPLES["photo"]).save(tmp_path / "1.png")
    image = {**plain["images"][0], "file_name": "1.png"}
    (tmp_path / "panoptic").mkdir()
    Image.fromarray(SAMPLES["panoptic_png"]).save(tmp_path / "panoptic" / "1.png")
    shared = {"images": [image], "categories": plain["categories"]}
    (tmp_path / "panoptic.json").write_text(json.dumps({**shared, "annotations": plain["panoptic"]}))
    (tmp_path / "instances.json").write_text(json.dumps({**shared, "annotations": plain["instances"]}))
    (tmp_path / "sa").mkdir()
    # The fixture's photograph as a JPEG would not be the fixture's; Pillow reads a PNG under any name.
    Image.fromarray(SAMPLES["photo"]).save(tmp_path / "sa" / "sa_1.jpg", format="PNG")
    (tmp_path / "sa" / "sa_1.json").write_text(json.dumps(plain["sa1b"]))
    return tmp_path


def native(source: ProxySource) -> Levels:
    """The target at the picture's own size."""
    image = source.load(0, ItemDraws(0), SAMPLES["photo"].shape[:2]).image
    assert image is not None
    return levels(image)


def test_panoptic_mean_is_the_published_png(annotations: Path) -> None:
    pictures = CocoPictures(annotations / "panoptic.json", images=annotations)
    source = ProxySource(pictures, proxies="panoptic", style="released", stretch=True)
    assert np.array_equal(native(source), SAMPLES["panoptic_png"])
    paper = ProxySource(pictures, proxies="panoptic", stretch=True)
    assert not np.array_equal(native(paper), SAMPLES["panoptic_png"])
    chosen = ProxySource(pictures, proxies="panoptic", colours={"panoptic": "mean"}, stretch=True)
    assert np.array_equal(native(chosen), SAMPLES["panoptic_png"])


@pytest.mark.parametrize("kind", ["instances", "sa1b"])
def test_ranked_masks_are_those_of_the_figure(kind: str, annotations: Path) -> None:
    pictures = (
        Sa1bPictures(annotations / "sa") if kind == "sa1b"
        else CocoPictures(annotations / "instances.json", images=annotations)
    )  # fmt: skip
    source = ProxySource(pictures, proxies="class_agnostic", style="released", stretch=True)
    assert np.array_equal(native(source), SAMPLES["inferred_class_agnostic"])
    view = own_view(pictures.load(0, SAMPLES["photo"].shape[:2]), "x")
    assert np.array_equal(view.labels, SAMPLES["labels"])


def test_stuff_colours() -> None:
    mask = np.zeros((4, 6), bool)
    mask[:2] = True
    segments = (
        Segment(mask=mask, category=1, name="person"),
        Segment(mask=~mask, category=169, name="tree", thing=False),
    )
    view = own_view(Annotated(image=Image.new("RGB", (6, 4)), segments=segments), "x")
    found = perception.semantic_stuff(view, np.random.default_rng(0))
    assert set(map(tuple, found[:2].reshape(-1, 3).tolist())) == {THINGS} == {(255, 215, 0)}
    assert set(map(tuple, found[2:].reshape(-1, 3).tolist())) == {stuff_colour(169, False)}
    assert stuff_colour(184, False) == stuff_colour(169, False), "tree-merged is tree"
    assert len(stuff_colours()) == 91
    assert len(set(stuff_colours())) >= 90
    assert max(max(colour) for colour in stuff_colours()) == round(0.7 * 255)


@pytest.mark.parametrize("proxy", sorted(PROXIES))
@pytest.mark.parametrize("style", ["paper", "released"])
def test_the_target_is_supervised_and_never_the_input(proxy: str, style: str, photographs: Path) -> None:
    """Before 2026-06-30 the release supervised the input picture in ten of its data sets."""
    pictures = CocoPictures(photographs / "panoptic.json", images=photographs / "images", depth=photographs / "depth")
    source = ProxySource(pictures, proxies=proxy, style=style, stretch=True, seed=2)
    sample = source.load(0, ItemDraws(0), (64, 64))
    assert sample.image is not None
    assert tuple(sample.image.shape) == (3, 64, 64)
    photo = Image.open(photographs / "images" / pictures.id(0)).convert("RGB")
    clean = to_tensor(resized(photo, (64, 64), stretch=True))
    seen = to_tensor(resized(to_pil(sample.context_images[0]), (64, 64), stretch=True))
    restores = not PROXIES[proxy].needs and proxy != "edges"
    if restores:
        assert (sample.image - clean).abs().max() <= 2 / 255, "the clean picture is wanted"
    else:
        assert (sample.image - clean).abs().mean() > 0.01, "the task's answer is wanted, not the picture"
        assert (seen - clean).abs().max() <= 2 / 255, "the picture is read as it is"
    if restores and proxy != "reconstruction":
        assert (seen - clean).abs().max() > 2 / 255, "a damaged picture is read"
