"""LoRA adapters that requests choose by name, as in `toy/iomm:style`: each is a copy of its model that shares all of
its weights and has the adapter's updates beside them. Copies are models of their own for the scheduler, so that
requests with unlike adapters never share a step."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diptych.core.errors import UserError, nearest, unknown
from diptych.inference.engine import Engine
from diptych.recipes import lora
from diptych.serving.errors import ApiError, bad

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MAX_ADAPTERS = 64
"""Of all models together."""


@dataclass
class Adapters:
    """The adapters of a server. known: a path with or without its scale, or several (`read_adapters`), by name, by the
    model that they are for. folder: from which requests may load further ones, None for none."""

    known: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    folder: Path | None = None

    def of(self, model: str) -> Mapping[str, str]:
        """Paths of a model's adapters by their names."""
        return self.known.get(model, {})

    def count(self) -> int:
        return sum(len(paths) for paths in self.known.values())

    def place(self, name: str) -> Path:
        """Where in the folder an adapter of this name lies.

        Raises:
            ApiError: there is no folder, or nothing of this name directly in it.
        """
        if self.folder is None:
            raise ApiError(403, "adapters are not loaded by request here; see --adapters", code="adapters_not_allowed")
        if not NAME.fullmatch(name):
            raise bad("name", "it must be the plain name of an entry of the folder")
        top = self.folder.resolve()
        for path in (top / name, top / f"{name}.safetensors"):
            # A link that leads elsewhere is not in the folder.
            if path.exists() and path.resolve().parent == top:
                return path.resolve()
        names = [path.stem if path.suffix == ".safetensors" else path.name for path in sorted(top.iterdir())]
        guess = nearest(name, names)
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise ApiError(
            404, f"there is no adapter {name!r} in the folder.{hint}", param="name", code="adapter_not_found"
        )


def read_adapters(given: list[str], models: list[str]) -> dict[str, dict[str, str]]:
    """Adapters that the command names: `NAME=PATH` for the first model, `MODEL:NAME=PATH` for another; a path may end
    in a scale, `PATH:SCALE`, and several go by one name with commas between them.

    Raises:
        UserError: another form, a model that is not served, a name that is given twice, no such file, or a scale that
            is no number.
    """
    known: dict[str, dict[str, str]] = {}
    for text in given:
        left, equals, path = text.partition("=")
        model, _, name = left.rpartition(":")
        model = model or models[0]
        if not equals or not NAME.fullmatch(name) or not path:
            raise UserError(f"--adapter {text}: must be NAME=PATH or MODEL:NAME=PATH, the name of letters and digits")
        if model not in models:
            raise unknown("model", model, models, f"--adapter {text}")
        for place, _ in paths_and_scales(path):
            if not place or not Path(place).expanduser().exists():
                raise UserError(f"--adapter {text}: {place or 'an empty path'} is not there")
        if name in known.setdefault(model, {}):
            raise UserError(f"--adapter {text}: {model} has an adapter {name!r} already")
        known[model][name] = path
    return known


def paths_and_scales(text: str) -> list[tuple[str, float]]:
    """`PATH:SCALE,PATH:SCALE,...` as pairs; a path that exists with its commas and its colon is a path."""
    if text and Path(text).expanduser().exists():
        return [(text, 1.0)]
    before, comma, after = text.partition(",")
    return paths_and_scales(before) + paths_and_scales(after) if comma else [lora.scaled(text)]


def with_adapter(engine: Engine, name: str, path: str) -> Engine:
    """A model with an adapter beside its weights, which it shares with the model; the path may end in a scale, and
    be followed by others (`read_adapters`).

    Raises:
        UserError: a file that is no LoRA, or one of another model.
    """
    system = engine.system
    shared = {id(tensor): tensor for tensor in (*system.parameters(), *system.buffers())}
    copied = copy.deepcopy(system, dict(shared))
    lora.add(copied, paths_and_scales(path))
    made = Engine(copied.to(system.device), engine.sampling, f"{engine.name}:{name}")
    made.placement = engine.placement
    return made
