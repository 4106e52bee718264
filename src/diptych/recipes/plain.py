"""Recipes as plain values: where they lie, what stands at their head, their bases and changed values.

Nothing here imports PyTorch, so that `diptych recipes` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.core.errors import UserError, unknown
from diptych.core.reading import read_text, read_yaml, yaml_value
from diptych.recipes.short_keys import spelled_out

LIBRARY = Path(__file__).parent / "library"


def names() -> list[str]:
    """The library's recipes, by name ("iomm/b_pretrain_image")."""
    return sorted(str(path.relative_to(LIBRARY).with_suffix("")) for path in LIBRARY.rglob("*.yaml"))


def find(name: str) -> Path:
    """The file of a recipe: a path, or a name of the library."""
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{name}: no such recipe file")
        return path
    if (LIBRARY / f"{name}.yaml").is_file():
        return LIBRARY / f"{name}.yaml"
    raise unknown("recipe", name, names())


def load_plain(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe as plain values, with its bases merged in and `key=value` overrides applied."""
    plain = _with_bases(find(name), ())
    for override in overrides:
        set_value(plain, override)
    return spelled_out(plain, "--set", over=True)


def header(name: str) -> list[str]:
    """The comment lines at a recipe's head: paper and table, expected cost and score, the command."""
    lines: list[str] = []
    for line in read_text(find(name)).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return lines


def set_value(plain: dict[str, Any], override: str) -> None:
    """Apply "dotted.key=value"; the value is read as YAML."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override}: write it as key=value, as in stages.pretrain.steps=100")
    *path, last = key.split(".")
    place: Any = plain
    for name in path:
        if not isinstance(place.setdefault(name, {}), dict):
            raise UserError(f"--set {override}: {name!r} is a value, not a mapping")
        place = place[name]
    place[last] = yaml_value(text, f"--set {override}")


def _with_bases(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path in above:
        raise UserError(f"{path}: is its own base")
    plain = read_yaml(path)
    if not isinstance(plain, dict):
        raise UserError(f"{path}: a recipe is a mapping")
    plain = spelled_out(plain, str(path))
    base = plain.pop("base", None)
    if base is None:
        return plain
    return merge(_with_bases(find(str(base)), (*above, path)), plain)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on `base`: mappings key by key, all else replaced; a key set to null is removed from a mapping."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("kind", old.get("kind")) == old.get("kind"):
            merged[key] = merge(old, value)
        elif value is None and isinstance(old, dict):
            del merged[key]
        else:
            merged[key] = value
    return merged


def description(name: str) -> str:
    """The first sentence of a recipe's header; "" where there is none."""
    lines: list[str] = []
    for line in header(name):
        if not line or line.startswith("Paper:"):
            break
        lines.append(line)
        if line.endswith("."):
            break
    return " ".join(lines)
