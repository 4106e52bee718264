"""Paths in a recipe's file are relative to that file, as those in the rows of a JSONL are to theirs.

Nothing here imports PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOURCE_PATHS = ("path", "maps", "prepared")
OPTION_PATHS = ("images", "masks", "depth", "targets", "list")
"""Of proxies (`recipes.pictures`)."""
PARTS = ("backbone", "conditioner", "connector", "refiner", "pooler", "decoder", "autoencoder", "network")
Change = Callable[[str], str]


def beside(plain: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe's plain values with the paths in them made absolute.

    Files and folders of data lie beside the recipe. A model is what lies beside it under this name, or begins with
    "./" or "../"; all other names are left for `names.locate`.

    Args:
        folder: of the recipe's file.
    """
    home = folder.resolve()

    def data(text: str) -> str:
        return text if _elsewhere(text) else os.path.normpath(home / text)

    def rows(text: str) -> str:
        """Of a parquet source: it may be a data set on the hub."""
        hub = text.count("/") == 1 and not text.endswith(".parquet") and not (home / text).exists()
        return text if hub else data(text)

    def model(text: str) -> str:
        if _elsewhere(text) or text.startswith("toy/"):
            return text
        here = (home / text).is_dir() or (home / text).is_file()
        return os.path.normpath(home / text) if here or text.startswith(("./", "../")) else text

    made = dict(plain)
    _change(made, ("start",), model)
    _change(_copied(made, "run"), ("sample_clip",), model)
    if isinstance(made.get("sample_edits"), list):
        made["sample_edits"] = [_edit(entry, data) for entry in made["sample_edits"]]
    system = _copied(made, "system")
    for name in PARTS:
        part = _copied(system, name)
        _change(part, ("weights", "tokenizer"), model)
        _change(_copied(part, "config"), ("llm", "vision"), model)
    init = _copied(system, "init")
    _change(init, tuple(init), model)
    stages = _copied(made, "stages")
    for name in stages:
        values = _copied(_copied(stages, name), "data")
        _change(values, ("cache",), data)
        sources = _copied(values, "sources")
        for each in sources:
            source = _copied(sources, each)
            _change(source, SOURCE_PATHS, rows if source.get("kind") == "parquet" else data)
            _change(_copied(source, "captions"), ("path",), data)
            _change(_copied(source, "filters"), ("scores",), data)
            _change(_copied(source, "options"), OPTION_PATHS, data)
    return made


def _edit(entry: Any, data: Change) -> Any:
    """An entry of sample_edits with the paths of its images changed."""
    if not isinstance(entry, dict) or not isinstance(entry.get("images"), list):
        return entry
    return {**entry, "images": [data(path) if isinstance(path, str) else path for path in entry["images"]]}


def _elsewhere(text: str) -> bool:
    """Whether a text says by itself where it is: an absolute path, one of the home folder, a URL or a command."""
    return os.path.isabs(text) or text.startswith(("~", "pipe:")) or "://" in text or not text


def _copied(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The mapping under a key, as a copy that stands in its place; an empty one where there is none."""
    inner = values.get(key)
    if not isinstance(inner, dict):
        return {}
    values[key] = dict(inner)
    return values[key]


def _change(values: dict[str, Any], keys: tuple[str, ...], change: Change) -> None:
    for key in keys:
        if isinstance(values.get(key), str):
            values[key] = change(values[key])
