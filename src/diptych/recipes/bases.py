"""What a saved model refers to: parts of other models, named so that they are found again from anywhere.

A hub id is saved with its commit (`owner/name@commit`), a folder by its path relative to the saved model and with a
digest of its weights, a shipped model by its name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash

from diptych.core.errors import UserError
from diptych.core.files import write_folder
from diptych.recipes.families.base import read_json
from diptych.recipes.names import commit_of, shipped
from diptych.systems.base import System

DIGESTS = "digests"
"""In a saved config.json: digests of the folders that its parts refer to, by part."""
BLOCKS, BLOCK = 16, 1 << 16
"""Of each file, so many blocks of so many bytes, evenly spread, are digested."""


def save_system(
    system: System,
    folder: Path,
    dtype: torch.dtype | None = None,
    also: Callable[[Path], None] | None = None,
) -> None:
    """A system in a folder of our layout, which appears whole or not at all; what it refers to is found from anywhere.

    Args:
        dtype: number format of the weights. also: writes more into the folder before it appears.
    """

    def write(temporary: Path) -> None:
        system.save_pretrained(temporary, dtype)
        refer_portably(temporary / "config.json", folder)
        if also is not None:
            also(temporary)

    write_folder(folder, write)


def refer_portably(file: Path, folder: Path) -> None:
    """Rewrite what a config.json that will lie in `folder` says of other models' weights."""
    config = read_json(file)
    if "kind" not in config:
        return
    digests: dict[str, str] = {}
    for role, part in parts_of(config):
        name = part.get("weights")
        if not name:
            if part.get("tokenizer") and any(file.parent.glob("tokenizer*")):
                part["tokenizer"] = None  # its files lie in the folder
        elif name not in shipped():
            place = Path(name).expanduser()
            if place.is_dir():
                path = os.path.relpath(place.resolve(), folder.resolve())
                part["weights"] = path if path.startswith("..") else f"./{path}"
                digests[role] = digest(place / (part.get("subfolder") or ""))
            elif "@" not in name and (commit := commit_of(name)):
                part["weights"] = f"{name}@{commit}"
    file.write_text(json.dumps({**config, **({DIGESTS: digests} if digests else {})}, indent=1))


def read_references(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a saved folder's config.json holds, with the folders that it refers to as they are found from here.

    Raises:
        UserError: such a folder is gone, or holds other weights than when the model was saved.
    """
    digests = config.pop(DIGESTS, {})
    for role, part in parts_of(config):
        name = part.get("weights")
        if not isinstance(name, str) or not name.startswith(("./", "../")):
            continue
        place = Path(os.path.normpath(folder.resolve() / name))
        if not place.is_dir():
            raise UserError(
                f"{folder}: its {role} is that of another model, {name} as seen from there, and {place} is gone; put "
                "that model back, or move both together"
            )
        if role in digests and digest(place / (part.get("subfolder") or "")) != digests[role]:
            raise UserError(
                f"{folder}: its {role} is that of {place}, which holds other weights than when the model was saved"
            )
        part["weights"] = str(place)
    return config


def parts_of(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The parts in a system's configuration, by role."""
    return [(role, part) for role, part in config.items() if isinstance(part, dict) and "weights" in part]


def digest(folder: Path) -> str:
    """A digest of a folder's weights: names and lengths of their files, and blocks all over them."""
    state = xxhash.xxh3_128()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        state.update(f"{file.name}:{size};".encode())
        with file.open("rb") as data:
            for number in range(BLOCKS):
                data.seek(max(size - BLOCK, 0) * number // (BLOCKS - 1))
                state.update(data.read(BLOCK))
    return state.hexdigest()
