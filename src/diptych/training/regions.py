"""Regional compilation: `torch.compile` of each block of a decoder by itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch

from diptych.core.errors import UserError
from diptych.parts.decoders.base import Decoder
from diptych.systems.base import System

COMPILERS = ("c++", "g++", "clang++")


def compile_regions(system: System, device: str, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile every block of the decoder, in place, at its first run.

    The blocks of a kind share what was compiled, and sizes are symbols: neither a further block nor another bucket
    compiles anew, and compiling takes the time of one block, not of the decoder. A block that torch cannot compile as a
    whole is an error, never a slower run.

    Args:
        device: the type of the device that it will run on.
        backend: of `torch.compile`.

    Raises:
        UserError: a system without a decoder of its own; a processor without a C++ compiler.
    """
    decoders = [module for module in system.modules() if isinstance(module, Decoder)]
    if not decoders:
        raise UserError(f"run.compile: {system.kind!r} has no decoder by itself to compile; use 'off'")
    if device == "cpu" and backend == "inductor" and not any(map(shutil.which, COMPILERS)):
        raise UserError(
            f"run.compile: on a CPU, torch.compile needs a C++ compiler ({', '.join(COMPILERS)}); use 'off'"
        )
    for decoder in decoders:
        for block in decoder.shard_units():
            # The forward pass alone: what a sharding engine does before and after it stays outside.
            block.forward = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=True)
