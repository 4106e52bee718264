"""What every system says of the sizes of its images."""

from __future__ import annotations

import pytest

from diptych.core.errors import UserError
from diptych.recipes.build import build_system
from diptych.recipes.recipe import load


@pytest.mark.parametrize(
    "name", ["toy/iomm_finetune_mix", "toy/bagel", "toy/omnigen2", "toy/hieraquery", "toy/ovis_u1"]
)
def test_the_longest_side_is_the_longest_that_is_made(name: str) -> None:
    system = build_system(load(name)[0].system, meta=True)
    step, longest = system.image_step, system.longest_side
    if longest is None:
        system.latent_shape(step, 4096 * step)
        return
    system.latent_shape(step, longest)
    with pytest.raises(UserError, match="position grid ends"):
        system.latent_shape(step, longest + step)
