"""The level rule: a room imports only rooms of a strictly lower level, in functions too; no file says nothing."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

import diptych

ROOT = Path(diptych.__file__).parent
LEVELS = {
    "core": 0,
    "parts": 2,
    "objectives": 1,
    "toyworld": 1,
    "checkpoints": 1,
    "data": 3,
    "systems": 3,
    "training": 4,
    "inference": 4,
    "reports": 5,
    "evaluation": 6,
    "analysis": 6,
    "recipes": 7,
    "serving": 8,
    "page": 9,
    "cli": 10,
}
FOLDERS = {"parts", "systems", "recipes/families", "data/proxies", "evaluation/understanding"}
"""Rooms, and folders of rooms, that hold folders of their own or are one."""
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc", "components"}
FILES = sorted(ROOT.rglob("*.py"))


def imported_rooms(path: Path) -> set[str]:
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "diptych":
                names = [f"diptych.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("diptych.")}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_levels(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    if len(parts) == 1:
        return
    own = parts[0]
    for room in imported_rooms(path):
        if room != own and room in LEVELS:
            assert LEVELS[room] < LEVELS[own], f"{own} (L{LEVELS[own]}) must not import {room} (L{LEVELS[room]})"


TYPED = ("meeting", "scaled")
"""Parts of the composed system that name its class for the type checker."""
SYSTEMS = ("diptych.systems.composed", "diptych.systems.mllm", "diptych.systems.bagel.system")


def test_systems_do_not_import_each_other() -> None:
    for path in (ROOT / "systems").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and path.stem not in TYPED and node.module:
                assert node.module not in SYSTEMS, f"{path}: a system imports {node.module}"


def test_rooms_have_a_level() -> None:
    rooms = {path.relative_to(ROOT).parts[0] for path in FILES if len(path.relative_to(ROOT).parts) > 1}
    assert rooms <= set(LEVELS)


def test_names_say_something() -> None:
    for path in FILES:
        assert not VAGUE & set(path.relative_to(ROOT).with_suffix("").parts), path


def test_depth_and_empty_inits() -> None:
    for path in FILES:
        parts = path.relative_to(ROOT).parts
        if not {parts[0], "/".join(parts[:2])} & FOLDERS:
            assert len(parts) <= 2, f"{path}: too deep"
        if path.name == "__init__.py" and len(parts) > 1 and parts[0] != "systems":
            assert not path.read_text().strip(), f"{path}: only the top __init__ has content"


def test_the_root_holds_what_it_names() -> None:
    """A command tried by hand in the checkout leaves its output there, and `git add` takes it along."""
    root = ROOT.parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    listing = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True)
    allowed = {
        *(".ci", ".dockerignore", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "Dockerfile", "LICENSE", "Makefile"),
        *("README.md", "benchmarks", "constraints.txt", "docs", "findings", "integrations", "mkdocs.yml"),
        *("pyproject.toml", "src", "tests"),
    }
    assert {name.split("/")[0] for name in listing.stdout.splitlines()} <= allowed
