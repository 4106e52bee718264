"""Two estimators: agreement by least squares, and what is written."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    DepthProConfig,
    DepthProForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
)

from diptych.core.draws import key
from diptych.core.errors import UserError
from diptych.data.proxies import depth_maps
from diptych.data.proxies.pictures import FolderPictures, SomePictures


@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 50), shift=st.floats(-5, 5))
@settings(max_examples=30, deadline=None)
def test_scale_and_shift_do_not_matter(seed: int, scale: float, shift: float) -> None:
    rng = np.random.default_rng(seed)
    distance = rng.uniform(0.5, 20, (12, 9)).astype(np.float32)
    nearness = (scale / distance + shift).astype(np.float32)
    assert depth_maps.discrepancy(nearness, distance) < 1e-3
    assert depth_maps.discrepancy(rng.random((12, 9), dtype=np.float32), distance) > 0.8


def test_discrepancy_is_what_is_left() -> None:
    """Uncorrelated noise of a third of the spread leaves noise / sqrt(1 + noise^2)."""
    rng = np.random.default_rng(0)
    inverse = rng.uniform(0.1, 1, (200, 200))
    noise = rng.standard_normal((200, 200)) * inverse.std() / 3
    found = depth_maps.discrepancy((inverse + noise).astype(np.float32), (1 / inverse).astype(np.float32))
    assert found == pytest.approx((1 / 3) / np.sqrt(1 + 1 / 9), rel=0.02)
    with pytest.raises(UserError, match="two sizes"):
        depth_maps.discrepancy(np.ones((2, 3), dtype=np.float32), np.ones((3, 2), dtype=np.float32))


def test_maps_are_made_where_estimators_agree(tmp_path: Path) -> None:
    for name in ("far", "odd"):
        Image.new("RGB", (8, 6), "teal" if name == "far" else "red").save(tmp_path / f"{name}.png")
    slope = np.linspace(1, 5, 48, dtype=np.float32).reshape(6, 8)

    def relative(image: Image.Image) -> np.ndarray:
        return slope if image.getpixel((0, 0)) == (0, 128, 128) else slope[::-1, ::-1] ** 3 % 2

    maps = tmp_path.with_name("maps-apart")
    left_out = depth_maps.make(tmp_path, maps, relative=relative, metric=lambda image: 1 / slope)
    assert list(left_out) == ["odd.png"]
    assert left_out["odd.png"].startswith("the estimators disagree")
    pictures = FolderPictures(tmp_path, depth=maps, name="x")
    assert [pictures.id(at) for at in range(len(pictures))] == ["far.png"]
    found = pictures.load(0, (6, 8)).depth
    assert found is not None
    assert np.abs(found / 65535 - (slope - 1) / 4).max() < 1e-4


def test_made_until_there_are_enough(tmp_path: Path) -> None:
    """Pictures that are left out are replaced by the next ones; what is there is kept."""
    for number in range(4):
        Image.new("RGB", (4, 4), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    slope = np.linspace(1, 3, 16, dtype=np.float32).reshape(4, 4)
    maps = tmp_path.with_name("maps-enough")
    seen: list[int] = []

    def relative(image: Image.Image) -> np.ndarray:
        pixel = image.getpixel((0, 0))
        assert isinstance(pixel, tuple)
        seen.append(int(pixel[0]) // 60)
        return slope if seen[-1] != order[1] else slope[::-1, ::-1] ** 3 % 2

    order = sorted(range(4), key=lambda number: key(0, f"{number}.png"))  # in which sources of proxies draw
    for _ in range(2):
        depth_maps.make(tmp_path, maps, relative=relative, metric=lambda image: 1 / slope, count=2)
        assert {path.name for path in maps.iterdir()} == {f"{order[0]}.png", f"{order[2]}.png"}
    assert seen == [order[0], order[1], order[2], order[1]]
    with pytest.raises(UserError, match="3 of 4 maps made, 1 pictures left out"):
        depth_maps.make(tmp_path, maps, relative=relative, metric=lambda image: 1 / slope, count=4)
    with pytest.raises(UserError, match="lies among the pictures"):
        depth_maps.make(tmp_path, tmp_path / "maps", relative=relative, metric=relative)


def test_the_metric_model(tmp_path: Path) -> None:
    """DepthPro at a tiny size; where torchvision is missing, the message says so."""
    torch.manual_seed(0)
    inner = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16)
    config = DepthProConfig(
        fusion_hidden_size=8, patch_size=32, intermediate_hook_ids=[1, 0], intermediate_feature_dims=[8, 8],
        scaled_images_ratios=[0.5, 1], scaled_images_overlap_ratios=[0.0, 0.25], scaled_images_feature_dims=[8, 8],
        use_fov_model=True, num_fov_head_layers=1, merge_padding_value=0,
        image_model_config=inner.to_dict(), patch_model_config=inner.to_dict(), fov_model_config=inner.to_dict(),
    )  # fmt: skip
    DepthProForDepthEstimation(config).save_pretrained(tmp_path)
    values = {"image_processor_type": "DepthProImageProcessor", "size": {"height": 64, "width": 64}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    if find_spec("torchvision") is None:
        with pytest.raises(UserError, match="Missing optional dependencies: torchvision"):
            depth_maps.estimator(tmp_path)
        return
    found = depth_maps.estimator(tmp_path)(Image.new("RGB", (40, 30), "olive"))
    assert found.shape == (30, 40)
    assert np.isfinite(found).all()
    assert (found > 0).all()


def test_a_model_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, head_hidden_size=4, patch_size=14,
    )  # fmt: skip
    DepthAnythingForDepthEstimation(config).save_pretrained(tmp_path)
    DPTImageProcessor(size={"height": 28, "width": 28}, ensure_multiple_of=14).save_pretrained(tmp_path)
    found = depth_maps.estimator(tmp_path)(Image.new("RGB", (40, 30), "olive"))
    assert found.shape == (30, 40)
    assert np.isfinite(found).all()
    with pytest.raises(UserError, match="no depth model"):
        depth_maps.estimator(tmp_path / "none")


def test_the_depth_pilot_sees_the_pictures_of_the_other_pilots(tmp_path: Path) -> None:
    """Of 200 pictures 40 are drawn; 5 % of maps are left out. The paper says that over 95 % of pictures are shared."""
    names = [f"{number:03}.png" for number in range(200)]
    (tmp_path / "pictures").mkdir()
    for name in names:
        Image.new("RGB", (8, 8), (int(name[:3]), 0, 0)).save(tmp_path / "pictures" / name)
    slope = np.linspace(1, 2, 64, dtype=np.float32).reshape(8, 8)

    def metric(image: Image.Image) -> np.ndarray:
        red = np.asarray(image)[0, 0, 0]
        return slope if red % 20 == 3 else 1 / slope  # those disagree with the relative map

    depth_maps.make(
        tmp_path / "pictures", tmp_path / "maps", relative=lambda image: slope, metric=metric, count=40, seed=7
    )
    others = SomePictures(FolderPictures(tmp_path / "pictures"), 40, seed=7)
    pilot = SomePictures(FolderPictures(tmp_path / "pictures", depth=tmp_path / "maps"), 40, seed=7)
    shared = {others.id(index) for index in range(40)} & {pilot.id(index) for index in range(40)}
    assert len(shared) >= 0.9 * 40
