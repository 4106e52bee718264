"""Configurations of published models, for builds on the meta device, where no weights are read.

A model that is loaded for real is built from its own config; these files only let `diptych check` and the tests count
parameters without a download. One JSON file for each hub id (and subfolder), under `sizes/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diptych.core.errors import UserError
from diptych.core.reading import read_object
from diptych.recipes.names import locate, shipped

SIZES = Path(__file__).parent / "sizes"


def folder_config(name: str) -> dict[str, Any]:
    """The config.json of a model by its name, downloaded where it has to be; UserError where it is not readable."""
    return read_object(locate(name) / "config.json", f"{name}: config.json")


def published_config(weights: str | None, subfolder: str | None = None) -> dict[str, Any]:
    """The config.json of a published model."""
    if weights is None:
        raise UserError("a part needs `weights` or a `config`")
    if weights in shipped() or Path(weights).is_dir():
        return read_object(locate(weights) / (subfolder or "") / "config.json")
    name = "__".join([*weights.split("/"), *([subfolder] if subfolder else [])]) + ".json"
    path = SIZES / name
    if not path.is_file():
        known = ", ".join(sorted(found.stem.replace("__", "/") for found in SIZES.glob("*.json")))
        raise UserError(f"{weights}: its sizes are not known without its files; give `config`. Known: {known}")
    return read_object(path)
