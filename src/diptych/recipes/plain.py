"""Recipes as plain values: where they lie, what stands at their head, their bases and changed values.

Nothing here imports PyTorch, so that `diptych recipes` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.core.errors import UserError, nearest, unknown
from diptych.core.reading import read_text, read_yaml, yaml_value
from diptych.recipes.paths import beside
from diptych.recipes.short_keys import spelled_out

LIBRARY = Path(__file__).parent / "library"
NAMED = {"stages": "stage", "sources": "source"}
"""Mappings whose keys are names that a recipe chose: a value in one that is not there is a mistake."""


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
    guess = nearest(name, names())
    hint = f" Did you mean {guess!r}?" if guess else ""
    file = "; a file of yours ends in .yaml" if path.exists() else ""
    raise UserError(f"unknown recipe {name!r}.{hint} `diptych recipes` lists them{file}.")


def load_plain(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe as plain values, with its bases merged in and `key=value` overrides applied."""
    plain = _with_bases(find(name), ())
    given: set[str] = set()
    for override in overrides:
        set_value(plain, override)
        key = override.partition("=")[0]
        if key in given:
            raise UserError(f"--set {key}: given twice")
        given.add(key)
    return spelled_out(plain, "--set", over=True)


def header(name: str) -> list[str]:
    """The comment lines at a recipe's head: paper and table, expected cost and score, the command."""
    lines: list[str] = []
    for line in read_text(find(name)).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return lines


def set_value(plain: dict[str, Any], override: str, *, new_names: bool = False) -> None:
    """Apply "dotted.key=value"; the value is read as YAML. Null removes a stage or a source, as it does in a file. A
    study's file may name stages anew (`new_names`)."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override}: write it as key=value, as in stages.pretrain.steps=100")
    *path, last = key.split(".")
    place: Any = plain
    for depth, name in enumerate(path):
        if not new_names and depth and path[depth - 1] in NAMED and name not in place:
            raise unknown(NAMED[path[depth - 1]], name, place, f"--set {override}")
        if not isinstance(place.setdefault(name, {}), dict):
            raise UserError(f"--set {override}: {name!r} is a value, not a mapping")
        place = place[name]
    value = yaml_value(text, f"--set {override}")
    if value is None and path and path[-1] in NAMED:
        if last not in place:
            raise unknown(NAMED[path[-1]], last, place, f"--set {override}")
        del place[last]
    else:
        place[last] = value


def _with_bases(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path in above:
        raise UserError(f"{path}: is its own base")
    plain = read_yaml(path)
    if not isinstance(plain, dict):
        raise UserError(f"{path}: a recipe is a mapping")
    plain = spelled_out(plain, str(path))
    if LIBRARY not in path.parents:
        plain = beside(plain, path.parent)
    base = plain.pop("base", None)
    if base is None:
        return plain
    return merge(_with_bases(_base(str(base), path.parent), (*above, path)), plain)


def _base(name: str, folder: Path) -> Path:
    """The file of a base: beside the recipe that names it, or as `find` finds it."""
    beside_it = folder / name
    return beside_it if beside_it.suffix in (".yaml", ".yml") and beside_it.is_file() else find(name)


def inherited(name: str) -> list[str]:
    """What a recipe of one's own has from its bases alone, by its keys: stages, sources, and top-level values that it
    does not say itself; nothing for one without a base, or of the library."""
    path = find(name)
    written = read_yaml(path)
    if LIBRARY in path.parents or not isinstance(written, dict) or written.get("base") is None:
        return []
    written, whole = spelled_out(written, str(path)), load_plain(name)
    kept: list[str] = []
    for stage, values in whole.get("stages", {}).items():
        said = _at(written, "stages", stage)
        if said is None:
            kept.append(f"stages.{stage}")
            continue
        sources = _at(said, "data", "sources") or {}
        inner = _at(values, "data", "sources") or {}
        kept += [f"stages.{stage}.data.sources.{source}" for source in inner if source not in sources]
    inherited = ("system", "start", "sampling", "sample_prompts", "sample_edits")
    kept += [key for key in inherited if key in whole and key not in written]
    prompts = _at(written, "system") is not None and _at(whole, "system", "prompts") is not None
    if prompts and _at(written, "system", "prompts") is None:
        kept.append("system.prompts")
    return kept


def _at(values: Any, *path: str) -> Any:
    """What lies at a place of nested mappings; None where there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values


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
