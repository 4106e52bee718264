"""AIMv2 at native resolution and its preprocessing, against the reference and transformers' fixed-size tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from transformers import Aimv2VisionConfig, Aimv2VisionModel

from diptych.checkpoints import aimv2
from diptych.core.errors import UserError
from diptych.parts.backbones.aimv2 import AIMv2, AIMv2Config, positions, window_order
from diptych.parts.backbones.native_resolution import (
    Pixels,
    covering,
    from_levels,
    pack_images,
    smart_resize,
    to_patches,
)
from diptych.parts.backbones.visual_tokenizer import placeholders

GOLDEN = Path(__file__).parents[2] / "golden" / "ovis_u1"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TOWER = "weights.visual_tokenizer.backbone."


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(GOLDEN / f"{name}_a.safetensors", framework="pt") as file:
        meta = {key: json.loads(value) for key, value in file.metadata().items()}
        return meta, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@torch.no_grad()
@pytest.mark.parametrize(
    "case", ["pe2d_rope", "pe1d_rope", "pe2d_rope_window", "rope_only", "pe2d_norope", "pe2d_rope_video"]
)
def test_states_are_the_references(case: str) -> None:
    meta, tensors = golden("aimv2_vit")
    told = meta["cases"][case]
    config = AIMv2Config(**meta["config"], **told["flags"])
    tower = AIMv2(config)
    tower.load_state_dict({key.removeprefix(TOWER): x for key, x in tensors.items() if key.startswith(TOWER)})
    grids = [(f, r, c) for f, r, c in tensors[f"inputs.{told['inputs']}.grid_thw"].tolist()]
    states = tower(tensors[f"inputs.{told['inputs']}.pixel_values"], grids)
    torch.testing.assert_close(states, tensors[f"outputs.{case}.hidden_last"], **CLOSE)
    normed = tower.trunk.post_trunk_norm(states)
    torch.testing.assert_close(normed, tensors[f"outputs.{case}.last_hidden_state"], **CLOSE)
    if f"steps.{case}.rope_positions" in tensors:
        assert torch.equal(positions(grids, config.hidden_stride), tensors[f"steps.{case}.rope_positions"].long())
    if f"steps.{case}.window_index" in tensors:
        order, lengths = window_order(grids, config)
        assert torch.equal(order, tensors[f"steps.{case}.window_index"].long())
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        assert torch.equal(bounds, tensors[f"steps.{case}.cu_window_seqlens"].long())


@torch.no_grad()
def test_packing_changes_no_image() -> None:
    torch.manual_seed(0)
    tower = AIMv2(
        AIMv2Config(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
            window_size=16,
            fullatt_block_indexes=(1,),
        )
    )
    grids = [(1, 4, 6), (1, 2, 2), (1, 6, 10), (1, 4, 6)]
    patches = [torch.randn(rows * columns, 48) for _, rows, columns in grids]
    together = tower(torch.cat(patches), grids).split([len(one) for one in patches])
    for one, grid, states in zip(patches, grids, together, strict=True):
        torch.testing.assert_close(states, tower(one, [grid]), **CLOSE)


@torch.no_grad()
def test_published_fixed_size_weights_give_transformers_states() -> None:
    """Without rotary positions, at the table's own size, the tower is the published one."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "patch_size": 4}
    sizes |= {"num_attention_heads": 2, "image_size": 16}
    theirs = Aimv2VisionModel(Aimv2VisionConfig(**sizes, use_head=False)).eval()
    tower = AIMv2(AIMv2Config(**sizes, disable_rope=True))
    tower.load_state_dict(dict(aimv2.to_ours(theirs.state_dict().items(), 4)))
    image = torch.randn(1, 3, 16, 16)
    patches, grid = to_patches(image, 4, 2)
    found = tower.trunk.post_trunk_norm(tower(patches, [grid]))
    wanted = theirs(image).last_hidden_state[0].unflatten(0, (4, 4))
    wanted = wanted.unflatten(0, (2, 2)).unflatten(2, (2, 2)).transpose(1, 2).flatten(0, 3)  # block by block
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert aimv2.resized(torch.randn(1, 16, 8), 6).shape == (1, 36, 8)
    with pytest.raises(UserError, match="no square"):
        aimv2.resized(torch.randn(1, 15, 8), 6)


def test_sizes_patches_and_pixels_are_the_references() -> None:
    meta, tensors = golden("preprocessing")
    for row, wanted in zip(
        tensors["inputs.smart_resize"].tolist(), tensors["outputs.smart_resize"].tolist(), strict=True
    ):
        assert list(smart_resize(*row)) == wanted
    for (width, height), wanted in zip(
        tensors["inputs.edit_chain"].tolist(), tensors["outputs.edit_chain"].tolist(), strict=True
    ):
        canvas = smart_resize(height, width, 32, 3136, 1003520)
        first = smart_resize(*canvas, 28, 3136, 200704)
        second = Pixels(patch=14, merge=2).size(*first)
        assert [*canvas, *first, *second, second[0] * second[1] // 784] == wanted
    for case, frames in (("image", 1), ("video", 2)):
        patches, grid = to_patches(tensors[f"inputs.numbered.{case}"], 2, 2)
        assert torch.equal(patches, tensors[f"outputs.numbered.{case}.patches"])
        assert [list(grid)] == tensors[f"outputs.numbered.{case}.grid_thw"].tolist()
        assert placeholders(frames) == tensors[f"outputs.numbered.{case}.placeholders"].tolist()
    photo = meta["photo"]
    pixels = Pixels(patch=14, merge=2, min_pixels=photo["min_pixels"], max_pixels=photo["max_pixels"])
    patches, grids = pack_images([from_levels(tensors["inputs.photo.rgb"].numpy())], pixels)
    torch.testing.assert_close(patches, tensors["outputs.photo.patches"], **CLOSE)
    assert [list(grid) for grid in grids] == tensors["outputs.photo.grid_thw"].tolist()
    for case in ("cover", "exact"):
        width, height = tensors[f"inputs.canvas.{case}.target_wh"].tolist()
        found = covering(from_levels(tensors[f"inputs.canvas.{case}.rgb"].numpy()), (height, width))
        torch.testing.assert_close(found, tensors[f"outputs.canvas.{case}.pixel_values"], **CLOSE)


@given(st.integers(1, 6000), st.integers(1, 6000))
def test_every_size_is_whole_tokens_within_the_limits_or_an_error(height: int, width: int) -> None:
    pixels = Pixels(patch=14, merge=2)
    if max(height, width) > 4000 * min(height, width):
        with pytest.raises(UserError, match=f"{height}x{width}"):
            pixels.size(height, width)
        return
    rows, columns = pixels.size(height, width)
    assert rows % 28 == columns % 28 == 0
    assert rows * columns <= pixels.max_pixels
    assert rows > 0 < columns


def test_an_image_of_1x5000_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="1x5000 pixels: too long and thin") as caught:
        Pixels(patch=14, merge=2).size(1, 5000)
    assert "\n" not in str(caught.value)
