"""Diptych: unified multimodal models that understand, make and edit images.

Public names are imported when they are first used, so that `import diptych` does not load PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diptych.core.errors import UserError
    from diptych.core.sample import Batch, Message, Sample
    from diptych.evaluation.evaluate import evaluate
    from diptych.inference.engine import Engine
    from diptych.inference.sampling import Sampling
    from diptych.recipes.load import load
    from diptych.recipes.train import train
    from diptych.serving.client import connect
    from diptych.systems.base import System
    from diptych.toyworld.samples import ToyWorld

__all__ = [
    "Batch",
    "Engine",
    "Message",
    "Sample",
    "Sampling",
    "System",
    "ToyWorld",
    "UserError",
    "connect",
    "evaluate",
    "load",
    "train",
]

_PLACES = {
    "Batch": "diptych.core.sample",
    "Engine": "diptych.inference.engine",
    "Message": "diptych.core.sample",
    "Sample": "diptych.core.sample",
    "Sampling": "diptych.inference.sampling",
    "System": "diptych.systems.base",
    "ToyWorld": "diptych.toyworld.samples",
    "UserError": "diptych.core.errors",
    "connect": "diptych.serving.client",
    "evaluate": "diptych.evaluation.evaluate",
    "load": "diptych.recipes.load",
    "train": "diptych.recipes.train",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("diptych")
    if name not in _PLACES:
        raise AttributeError(f"module 'diptych' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
