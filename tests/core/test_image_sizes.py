"""Sizes of images of their own shape, as the released SGT and the systems' releases give them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.core.errors import UserError
from diptych.core.image_sizes import AreaCap, SideRange
from sgt_golden import facts

FACTS = facts("transforms")
SIDES = st.integers(1, 5000)


@pytest.mark.parametrize("name", sorted(FACTS["configs"]))
def test_side_ranges_are_the_releases(name: str) -> None:
    config: dict[str, Any] = FACTS["configs"][name]
    stride = config["stride"]
    rule = SideRange(longest=config["longest"], shortest=config["shortest"], area=config["max_pixels"], root=True)
    for width, height, images, wide, tall, tokens in FACTS["sizes"][name]:
        assert rule.fit(height, width, stride, images) == (tall, wide), (width, height, images)
        assert tall * wide // stride**2 == tokens


def test_area_caps_are_the_releases() -> None:
    case = FACTS["omnigen2_target_sizes"]
    rule = AreaCap(max_pixels=case["max_pixels"], max_side=case["max_side"])
    for width, height, wide, tall, _ in case["rows"]:
        assert rule.fit(height, width, case["stride"]) == (tall, wide), (width, height)


@given(height=SIDES, width=SIDES, images=st.integers(1, 12), root=st.booleans())
@settings(max_examples=200, deadline=None)
def test_sides_are_whole_patches_within_the_longest(height: int, width: int, images: int, root: bool) -> None:
    rule = SideRange(longest=980, shortest=378, root=root)
    tall, wide = rule.fit(height, width, 14, images)
    assert tall % 14 == wide % 14 == 0
    assert min(tall, wide) >= 14
    assert max(tall, wide) <= 980


@given(height=SIDES, width=SIDES)
@settings(max_examples=200, deadline=None)
def test_a_cap_never_enlarges(height: int, width: int) -> None:
    tall, wide = AreaCap().fit(height, width, 16)
    assert tall % 16 == wide % 16 == 0
    assert tall <= max(height, 16)
    assert wide <= max(width, 16)
    assert max(tall, wide) <= 2048
    assert tall * wide <= max(1024 * 1024, 2048 * 16)


def test_mistakes() -> None:
    with pytest.raises(UserError, match="shortest"):
        SideRange(longest=100, shortest=200)
    with pytest.raises(UserError, match="max_side"):
        AreaCap(max_side=0)
