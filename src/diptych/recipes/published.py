"""Configurations of published models, for builds on the meta device, where no weights are read.

A model that is loaded for real is built from its own config; these files only let `diptych check` and the tests count
parameters without a download. One JSON file for each hub id (and subfolder), under `sizes/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diptych.core.errors import UserError
from diptych.core.reading import read_object
from diptych.recipes.names import is_local, locate, locate_configs

SIZES = Path(__file__).parent / "sizes"


def folder_config(name: str) -> dict[str, Any]:
    """The config.json of a model by its name, downloaded where it has to be; UserError where it is not readable."""
    return read_object(locate(name) / "config.json", f"{name}: config.json")


def published_config(weights: str | None, subfolder: str | None = None) -> dict[str, Any]:
    """The config.json of a published model: of a folder here, of those whose sizes are kept, or from the hub.

    Raises:
        UserError: none of these.
    """
    if weights is None:
        raise UserError("a part needs `weights` or a `config`")
    if is_local(weights):
        return read_object(locate(weights) / (subfolder or "") / "config.json")
    path = sizes_file(weights, subfolder)
    if path.is_file():
        return read_object(path)
    try:
        folder = locate_configs(weights)
    except UserError as error:
        known = ", ".join(sorted(path.stem.replace("__", "/") for path in SIZES.glob("*.json")))
        raise UserError(
            f"{weights}: its sizes are not known without its files ({error}); give `config`. Known: {known}"
        ) from error
    return read_object(
        folder / (subfolder or "") / "config.json", f"{weights}: {f'{subfolder}/' if subfolder else ''}config.json"
    )


def sizes_file(weights: str, subfolder: str | None = None) -> Path:
    """Where the sizes of a hub id are kept, if they are."""
    return SIZES / ("__".join([*weights.partition("@")[0].split("/"), *([subfolder] if subfolder else [])]) + ".json")
