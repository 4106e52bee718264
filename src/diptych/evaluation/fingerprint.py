"""What a model's outputs depend on: its name, its weights and its sampling, as journals record them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from diptych.inference.engine import Engine


def made_by(engine: Engine, options: Mapping[str, Any], seed: int | None) -> dict[str, Any]:
    """Everything of a model that decides its outputs: name, digest of the weights, sampling, seed.

    Args:
        options: fields of `Sampling` in place of the model's own. seed: None where nothing is drawn.
    """
    sampling = dataclasses.asdict(engine.sampling.over(options))
    made: dict[str, Any] = {"model": engine.name, "weights": digest(engine.system)}
    if seed is not None:
        made |= {"seed": seed, "sampling": {name: sampling[name] for name in sampling if name != "batch_size"}}
    return json.loads(json.dumps(made))


@torch.no_grad()
def digest(system: nn.Module) -> str:
    """A digest of all weights of a system, adapters included: names, types, shapes and bits."""
    hashed = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(system.state_dict().items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
