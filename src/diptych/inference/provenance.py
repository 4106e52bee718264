"""What a picture carries: all that makes it again, as texts in a PNG file."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diptych.inference.sampling import Sampling


@functools.cache
def software() -> str:
    """This version; the package's metadata is a file, which is read once."""
    return f"diptych {version('diptych')}"


def facts(settings: Sampling, *, model: str, seed: int, **others: str) -> dict[str, str]:
    """What a picture carries: all that makes it again. `settings`, as JSON, are all of its sampling's."""
    plain = {name: value for name, value in dataclasses.asdict(settings).items() if name != "edit"}
    shared = {
        "model": model,
        "seed": str(seed),
        "settings": json.dumps(plain),
        "software": software(),
    }
    return {**others, **shared}


def png_info(about: Mapping[str, str]) -> PngInfo:
    """The texts of a PNG file."""
    info = PngInfo()
    for name, value in about.items():
        info.add_itxt(name, value)
    return info


def carried(image: Image.Image) -> dict[str, Any]:
    """What a picture says of how it was made, its settings read; empty for one that says nothing."""
    image.load()
    texts = {str(name): value for name, value in image.info.items() if isinstance(value, str)}
    if "settings" not in texts or not texts.get("software", "").startswith("diptych "):
        return {}
    try:
        settings = json.loads(texts["settings"])
        seed = int(texts.get("seed", "0"))
    except ValueError:
        return {}
    return {**texts, "settings": settings, "seed": seed} if isinstance(settings, dict) else {}
