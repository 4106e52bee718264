"""Pictures that the page shows: kept as files that carry their settings, read again with these, and said in words."""

from __future__ import annotations

import html
import json
import re
import secrets
import shutil
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from diptych.core.errors import UserError
from diptych.inference.provenance import carried
from diptych.serving.errors import ApiError, as_api_error, bad
from diptych.serving.pictures import check_header, encode, read_picture
from diptych.serving.service import Made

KEPT = 1000
"""Pictures on the shelf; the oldest goes."""


class Shelf:
    """A folder of pictures, each with its settings in its file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: deque[Path] = deque()

    def keep(self, image: Image.Image, about: Mapping[str, str]) -> str:
        """The path of a picture's new file, which is named by its words and its seed."""
        words = about.get("prompt", about.get("instruction", "picture"))
        name = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:60] or "picture"
        place = self.folder / secrets.token_hex(8)
        place.mkdir(parents=True)
        path = place / f"{name}-{about.get('seed', '0')}.png"
        path.write_bytes(encode(image, "png", None, about))
        self._kept.append(place)
        while len(self._kept) > KEPT:
            shutil.rmtree(self._kept.popleft(), ignore_errors=True)
        return str(path)

    def keep_all(self, made: Made) -> list[str]:
        """The files of a request's pictures, each at its last scale."""
        return [self.keep(row[-1], about) for row, about in zip(made.images, made.abouts, strict=True)]


def read_file(path: str, name: str = "picture") -> Image.Image:
    """An uploaded picture as RGB, upright; an error says what is wrong with it."""
    return read_picture(Path(path).read_bytes(), name)


def settings_in(path: str) -> dict[str, Any]:
    """What a picture's file says of how it was made.

    Raises:
        ApiError: a file that is no picture, or a picture that says nothing.
    """
    check_header(Path(path).read_bytes(), "picture")
    try:
        with Image.open(path) as image:
            about = carried(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise bad("picture", f"it cannot be read ({error})", "invalid_image") from error
    if not about:
        raise bad("picture", "it carries no settings; pictures that Diptych saved as PNG do", "no_settings")
    return about


def described(path: str) -> dict[str, Any]:
    """A picture's settings to show, in the order of their use."""
    about = settings_in(path)
    settings = about.pop("settings")
    return {**{name: about[name] for name in sorted(about)}, **settings}


def other_settings(text: str) -> dict[str, Any]:
    """Settings that were typed, one `name=value` a line."""
    values: dict[str, Any] = {}
    for line in (line.strip() for line in text.splitlines()):
        if not line:
            continue
        name, equals, value = line.partition("=")
        if not equals or not name.strip():
            raise bad("other settings", f"each line is name=value, as in solver=heun; {line!r} is not")
        try:
            values[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise bad("other settings", f"{name.strip()}: {value!r} cannot be read") from error
    return values


def typed(settings: Mapping[str, Any]) -> str:
    """Settings as `other_settings` reads them."""
    return "\n".join(f"{name}={json.dumps(value)}" for name, value in settings.items())


def note(text: str, error: bool = False) -> str:
    """A line for the page, which screen readers speak."""
    return (
        f'<p role="{"alert" if error else "status"}" class="{"problem" if error else "note"}">{html.escape(text)}</p>'
    )


def in_words(error: Exception) -> str:
    """What went wrong, as the API says it."""
    if isinstance(error, UserError | ApiError):
        return getattr(error, "message", str(error))
    return as_api_error(error, "of the page").message
