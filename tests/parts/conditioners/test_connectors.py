"""OpenUni's connector against values of the reference implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from diptych.core.errors import UserError
from diptych.parts.conditioners.connectors import OpenUniConnector, OpenUniConnectorConfig

GOLDEN = Path(__file__).parents[2] / "golden" / "openuni"


def read(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", ["openuni_connector", "openuni_connector_proj_enc_proj"])
def test_condition_and_gradient_are_the_references(name: str) -> None:
    config, tensors = read(name)
    sizes = config["connector"]
    made = OpenUniConnectorConfig(
        width=config["llm_hidden_size"],
        out=config["caption_channels"],
        hidden=sizes["hidden_size"],
        mlp=sizes["intermediate_size"],
        heads=sizes["num_attention_heads"],
        layers=sizes["num_hidden_layers"],
        arrangement=config["proj_type"],
    )
    connector = OpenUniConnector(made)
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    connector.load_state_dict({key.removeprefix("connector."): value for key, value in weights.items()})

    states = tensors["inputs.hidden_states"].requires_grad_()
    condition = connector(states)
    close(condition, tensors["outputs.condition"])
    (gradient,) = torch.autograd.grad((condition * tensors["inputs.probe"]).sum(), states)
    close(gradient, tensors["outputs.grad_hidden_states"])


def test_projection_may_come_first() -> None:
    connector = OpenUniConnector.from_config(
        {"width": 6, "out": 8, "hidden": 8, "mlp": 12, "heads": 2, "layers": 1, "arrangement": "proj_enc"}
    )
    states = torch.randn(2, 3, 6)
    expected = connector.layers[0](connector.projector(states))
    torch.testing.assert_close(connector(states), expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden": 8, "arrangement": "enc_proj"}, "encodes at width 6"),
        ({"hidden": 6, "arrangement": "proj_enc"}, "encodes at width 8"),
        ({"hidden": 6, "heads": 4}, "4 heads do not divide"),
        ({"hidden": 6, "arrangement": "enc_pro"}, "enc_proj"),
    ],
)
def test_sizes_that_do_not_fit_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OpenUniConnector.from_config({"width": 6, "out": 8, "mlp": 12, "heads": 2, **values})
