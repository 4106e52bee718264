"""Position tables, places of grids, waves of times, and rotary positions on one axis, as BAGEL has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from diptych.core.errors import UserError
from diptych.core.patchify import patchify, unpatchify
from diptych.core.positions import grid_ids, sincos_table, stretched_ids, time_waves
from diptych.core.rope import line_rotation, rotate_halves

FOLDER = Path(__file__).parents[1] / "golden" / "bagel"


def read(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(FOLDER / f"bagel_{name}.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


CONFIG, GOLDEN = read("positions")


@pytest.mark.parametrize(("dim", "side"), CONFIG["tables"])
def test_sincos_table(dim: int, side: int) -> None:
    torch.testing.assert_close(sincos_table(dim, side), GOLDEN[f"outputs.sincos_dim{dim}_grid{side}"])


@pytest.mark.parametrize("number", range(len(CONFIG["flat_cases_H_W_patch_maxside"])))
def test_places(number: int) -> None:
    height, width, patch, side = CONFIG["flat_cases_H_W_patch_maxside"][number]
    rows, columns = height // patch, width // patch
    assert torch.equal(stretched_ids(rows, columns, side), GOLDEN[f"outputs.flat_interpolate.{number}"])
    if rows <= side and columns <= side:
        assert torch.equal(grid_ids(rows, columns, side), GOLDEN[f"outputs.flat_extrapolate.{number}"])
    else:
        with pytest.raises(UserError, match="larger than the model's table"):
            grid_ids(rows, columns, side)


@pytest.mark.parametrize("dim", CONFIG["timestep_dims"])
def test_time_waves(dim: int) -> None:
    torch.testing.assert_close(
        time_waves(GOLDEN["inputs.timesteps"], dim), GOLDEN[f"outputs.timestep_embedding_dim{dim}"]
    )


@pytest.mark.parametrize("number", range(len(CONFIG["rope"])))
def test_line_rotation(number: int) -> None:
    dim, theta = CONFIG["rope"][number]["head_dim"], CONFIG["rope"][number]["theta"]
    ids = GOLDEN["inputs.rope_position_ids"]
    turn = line_rotation(ids, dim, theta)
    ramp = (torch.arange(len(ids) * dim) * 0.1).reshape(len(ids), 1, dim)
    torch.testing.assert_close(turn[0], GOLDEN[f"outputs.rope_cos.{number}"], rtol=0, atol=1e-4)
    torch.testing.assert_close(turn[1], GOLDEN[f"outputs.rope_sin.{number}"], rtol=0, atol=1e-4)
    expected = GOLDEN[f"outputs.rope_applied_to_ramp.{number}"]
    torch.testing.assert_close(
        rotate_halves(ramp, turn)[:, 0], expected, rtol=0, atol=1e-4 * float(expected.abs().max())
    )


def test_latent_tokens() -> None:
    config, golden = read("vae_patch")
    for number, case in enumerate(config["latent_cases"]):
        rows, columns, patch = case["h"], case["w"], case["p"]
        latent = golden[f"inputs.latent.{number}"][None, :, : rows * patch, : columns * patch]
        tokens = patchify(latent, patch, "pqc")
        assert torch.equal(tokens[0], golden[f"outputs.tokens.{number}"])
        assert torch.equal(unpatchify(tokens, patch, "pqc", rows, columns), golden[f"outputs.unpatchified.{number}"])
    assert torch.equal(patchify(golden["inputs.image"][None], 4, "pqc")[0], golden["outputs.image_tokens"])
