"""Where a MODEL lies: a shipped name, a run folder, a folder in save_pretrained layout, or a hub id."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

import diptych
from diptych.core.errors import UserError, unknown

SHIPPED = Path(diptych.__file__).parent / "toy"
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "**/*.json", "**/*.safetensors", "**/*.txt"]


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(f"toy/{path.name}" for path in SHIPPED.glob("*") if (path / "config.json").is_file())


def locate(name: str) -> Path:
    """The folder of a MODEL; a hub id is downloaded (safetensors, configuration and tokenizer files only)."""
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
    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{name}: the hub cannot be reached and nothing is cached; check the network, or give a local folder"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"{name}: not found on the hub or not readable ({type(error).__name__})") from error
