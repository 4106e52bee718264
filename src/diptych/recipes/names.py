"""Where a MODEL lies: a shipped name, a run folder, a folder in save_pretrained layout, or a hub id.

A hub id may end in "@" and a commit, branch or tag.
"""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

import diptych
from diptych.core.errors import UserError, nearest, unknown

RUNS = Path("runs")
"""Where runs go when nothing else is said."""
SHIPPED = Path(diptych.__file__).parent / "toy"
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "**/*.json", "**/*.safetensors", "**/*.txt"]


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(f"toy/{path.name}" for path in SHIPPED.glob("*") if (path / "config.json").is_file())


def model_name(model: object) -> str:
    """A MODEL's name as it was given, or as a path; UserError for anything else."""
    if not isinstance(model, str | os.PathLike):
        raise UserError(f"a MODEL is the name of one or a folder, not {type(model).__name__}")
    return str(os.fspath(model))


def locate(name: str) -> Path:
    """The folder of a MODEL; a hub id is downloaded (safetensors, configuration and tokenizer files only)."""
    return _locate(name, PATTERNS)


def locate_configs(name: str) -> Path:
    """The folder of a MODEL as `locate` finds it; of a hub id, a folder with its JSON files alone."""
    return _locate(name, ["*.json", "**/*.json"])


def is_local(name: str) -> bool:
    """Whether a MODEL needs no hub: it is shipped, or a folder here."""
    return name in shipped() or Path(name).expanduser().is_dir()


def _locate(name: str, patterns: list[str]) -> Path:
    if not name.strip():
        raise UserError(f"the name of a MODEL is empty; give a folder, a hub id, or one of: {', '.join(shipped())}")
    if name in shipped():
        return SHIPPED / name.removeprefix("toy/")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{name}: a file, not a model folder")
    if name.startswith("toy/"):
        raise unknown("shipped model", name, shipped())
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such folder, and no hub id (owner/name). Shipped: {', '.join(shipped())}")
    models = models_in(path.parent)
    if models or path.parent == RUNS:  # no hub id, but a folder beside these
        guess = nearest(name, models)
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise UserError(f"{name}: no such folder.{hint} Models in {path.parent}: {', '.join(models) or '(none)'}.")
    hub, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(hub, revision=revision or None, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{name}: the hub cannot be reached and nothing is cached; check the network, or give a local folder"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"{name}: not found on the hub or not readable ({type(error).__name__})") from error


def commit_of(name: str) -> str | None:
    """The commit of what is cached of a hub id; None where nothing is."""
    try:
        return Path(snapshot_download(name, local_files_only=True)).name
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def models_in(folder: Path) -> list[str]:
    """The runs and models in a folder; a name that begins with this folder's is then no hub id."""
    if not folder.is_dir():
        return []
    marks = ("config.json", "recipe.yaml", "model_index.json", "llm_config.json")
    return [str(path) for path in sorted(folder.iterdir()) if any((path / mark).is_file() for mark in marks)]
