"""The quick start's folder: what it made there is listed in a file, and nothing else is ever removed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diptych.core.errors import UserError
from diptych.core.filenames import member_path
from diptych.core.files import make_folder, write_text
from diptych.core.locks import NAME as LOCK

MARKER = ".diptych-quickstart.json"
_KILLED = re.compile(
    r"(recipe\.yaml|metrics\.jsonl|results\.json|report\.html|curves\.svg|(before|after)\.png|[^/]*\.lock"
    r"|tensorboard/(.*/)?events\.out\.[^/]+|samples/(.*/)?[^/]+\.(png|json)|checkpoints/\.?step-[^/]+/[^/]+"
    r"|\.?model[^/]*/[^/]+\.(safetensors|json|txt|jinja|model)|model/(.*/)?[^/]+\.(safetensors|json|txt|jinja|model)"
    r"|\.[^/]+\.(partial|old|gone)(\.\w+)?)"
)
"""Files of a quick start that was killed before it could list them."""


@contextmanager
def marked(folder: Path) -> Iterator[None]:
    """Notes that the folder is a quick start's, and at the end, however that comes, which files are its."""
    make_folder(folder)
    others = {str(path.relative_to(folder)) for path in files(folder)}
    write_text(folder / MARKER, json.dumps({"others": sorted(others)}) + "\n")
    try:
        yield
    finally:
        made = [name for name in (str(path.relative_to(folder)) for path in files(folder)) if name not in others]
        write_text(folder / MARKER, json.dumps({"made": sorted({*made, MARKER})}, indent=1) + "\n")


def files(folder: Path) -> list[Path]:
    """Files and links below a folder, but for its lock; folders that are links are not entered."""
    paths = [Path(place, name) for place, _, names in os.walk(folder) for name in names if name != LOCK]
    return paths + [Path(place, name) for place, names, _ in os.walk(folder) for name in names if _is_link(place, name)]


def _is_link(place: str, name: str) -> bool:
    return os.path.islink(os.path.join(place, name))


def made_here(folder: Path) -> list[Path]:
    """The files that a quick start made in the folder; UserError where it holds none of it."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        listed, others = marker.get("made"), marker.get("others", [])
        names = [str(member_path(name, str(folder / MARKER))) for name in [*(listed or []), *others]]
    except (OSError, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise UserError(
            f"{folder}: holds other files, which are left alone; choose another --out (there is no readable {MARKER}, "
            "the quick start's own list)"
        ) from error
    there = {str(path.relative_to(folder)): path for path in files(folder)}
    if listed is None:  # it was killed
        return [
            path for name, path in there.items() if name not in names and (name == MARKER or _KILLED.fullmatch(name))
        ]
    return [there[name] for name in names if name in there]


def check_room(folder: Path, force: bool) -> None:
    """Nothing is replaced unless asked for, and only a quick start's own files ever are; UserError otherwise."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: a file, not a folder; choose another --out")
    if not files(folder) and not any(path.is_dir() for path in folder.iterdir()):
        return
    made = made_here(folder)
    if not force:
        seen = f" See {folder / 'report.html'}." if (folder / "report.html").is_file() else ""
        raise UserError(
            f"{folder}: holds a quick start already.{seen} Replace it with --force, or choose another --out"
        )
    foreign = sorted(str(path.relative_to(folder)) for path in {*files(folder)} - {*made})
    inside = [name for name in foreign if name.startswith(("model/", "checkpoints/"))]
    if inside:
        raise UserError(f"{folder}: {inside[0]} was not made by the quick start; move it, or choose another --out")


def clear(folder: Path) -> None:
    """Remove what a quick start made in the folder, and the folders that are empty then."""
    if not folder.is_dir() or not files(folder):
        return
    for path in made_here(folder):
        path.unlink()
    for place, _, _ in sorted(os.walk(folder), reverse=True):
        if place != str(folder) and not os.listdir(place):
            os.rmdir(place)
