"""A program of its own: the tensors of a pickle file as safetensors. `checkpoints.pickles` runs it in another process.

It imports nothing of Diptych, and reads with `weights_only`, so that the file can name no function to be called.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file

NESTED = ("state_dict", "model", "module")
"""Keys under which a training loop keeps the weights beside other things."""
NOT_READ, NOT_WEIGHTS = 2, 3
"""Exit codes: PyTorch did not read the file; what it read is no mapping of names to tensors."""


def tensors_of(loaded: Any) -> dict[str, torch.Tensor]:
    """The weights by name; ValueError where there are none, or something else stands among them."""
    while isinstance(loaded, Mapping):
        inner = [key for key in NESTED if isinstance(loaded.get(key), Mapping)]
        if not inner:
            break
        loaded = loaded[inner[0]]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f"holds no mapping of names to tensors, but a {type(loaded).__name__}")
    others = [str(name) for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f"{others[0]} is no tensor")
    return {str(name): value.detach().clone().contiguous() for name, value in loaded.items()}  # none shares memory


def main(source: str, target: str) -> int:
    """Convert; the exit code: 0, or with a line on stderr NOT_READ or NOT_WEIGHTS."""
    code = NOT_READ
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
        code = NOT_WEIGHTS
        save_file(tensors_of(loaded), target)
    except Exception as error:
        sys.stderr.write(" ".join(str(error).split())[:400] + "\n")
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
