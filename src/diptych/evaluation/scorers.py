"""Models of transformers that score, loaded as safetensors alone: no pickle, and no code that comes with a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from diptych.core.errors import UserError


def load_scorer(
    cls: Any, place: str, what: str, *, revision: str | None = None, dtype: torch.dtype | str | None = None
) -> Any:
    """`cls.from_pretrained(place)`.

    Args:
        cls: a class of transformers, of models (then `dtype` is given), tokenizers or processors.
        place: a folder or hub id. what: the option that names it, for the error. revision: a commit of the hub.

    Raises:
        UserError: nothing that this class reads; weights that are pickles; a model that needs code of its own.
    """
    given: dict[str, Any] = {} if dtype is None else {"dtype": dtype, "use_safetensors": True}
    given |= {} if revision is None else {"revision": revision}
    try:
        # Code that comes with a model is never run, whatever its config.json asks for.
        return cls.from_pretrained(place, trust_remote_code=False, **given)
    except Exception as error:  # transformers raises whatever reading a broken file raises
        raise UserError(f"{what}: could not be loaded: {reason(Path(place), error, dtype is not None)}") from error


def unreadable(folder: Path, model_type: str) -> str | None:
    """Why a folder holds no model of this type of transformers, without reading its weights; None where it does."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    if isinstance(config, dict) and config.get("model_type") != model_type:
        return f"its config.json is not of a model of type {model_type!r}"
    if isinstance(config, dict) and list(folder.glob("*.safetensors")):
        return None
    return reason(folder, OSError(), weights=True)


def reason(folder: Path, error: Exception, weights: bool) -> str:
    """Why, in one sentence; what is wrong with the folder where that can be seen."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    if weights and folder.is_dir():
        if not isinstance(config, dict):
            return "its config.json is missing or no JSON object"
        if "auto_map" in config and "trust_remote_code" in str(error):
            return "it asks to run code of its own (auto_map), which is never done (trust_remote_code=False)"
        if not list(folder.glob("*.safetensors")):
            pickles = sorted(path.name for path in folder.glob("*.bin"))
            there = f"; {pickles[0]} is a pickle, which can run code when opened" if pickles else ""
            return f"it has no .safetensors{there}"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
