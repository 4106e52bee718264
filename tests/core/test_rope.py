from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from diptych.core.errors import UserError
from diptych.core.rope import grid_positions, rotate, rotation, text_positions

AXES = (4, 6, 6)


def test_same_as_flux() -> None:
    torch.manual_seed(0)
    positions = torch.cat([text_positions(3), grid_positions(4, 5)], dim=1)
    x = torch.randn(2, 23, 3, 16)
    theirs = apply_rotary_emb(x, FluxPosEmbed(theta=10_000, axes_dim=list(AXES))(positions[0]), sequence_dim=1)
    torch.testing.assert_close(rotate(x, rotation(positions, AXES)), theirs, rtol=1e-5, atol=1e-5)


def test_product_depends_on_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def product(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
        turned = [rotate(x, rotation(torch.tensor([[at]], dtype=torch.float32), AXES)) for x, at in ((q, a), (k, b))]
        return float((turned[0] * turned[1]).sum())

    assert product((0, 3, 5), (1, 1, 7)) == pytest.approx(product((4, 12, 15), (5, 10, 17)), abs=1e-5)
    assert product((0, 3, 5), (1, 1, 7)) != pytest.approx(product((0, 3, 5), (1, 1, 8)), abs=1e-3)


def test_origin_is_not_turned_and_dtype_stays() -> None:
    x = torch.randn(1, 2, 1, 16).bfloat16()
    assert torch.equal(rotate(x, rotation(text_positions(2), AXES)), x)


def test_positions_per_sample() -> None:
    x = torch.randn(2, 3, 1, 16)
    positions = torch.rand(2, 3, 3) * 9
    both = rotate(x, rotation(positions, AXES))
    torch.testing.assert_close(both[1:], rotate(x[1:], rotation(positions[1:], AXES)))


def test_grid_order() -> None:
    assert grid_positions(2, 3)[0].tolist() == [[0, r, c] for r in range(2) for c in range(3)]


@pytest.mark.parametrize("axes", [(4, 6), (3, 6, 7)])
def test_bad_axes(axes: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="even"):
        rotation(text_positions(2), axes)
