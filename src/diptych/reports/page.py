"""Pages as one HTML file that needs nothing else: styles, pictures and charts are all inside.

Templates escape every text (Jinja2's autoescape); what a block function gives is HTML already, and `page` puts such
pieces together.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from diptych.core.files import write_text


@dataclass(frozen=True, kw_only=True)
class Strip:
    """A labelled row of pictures, each with its words for those who do not see it."""

    label: str
    images: Sequence[Image.Image]
    alts: Sequence[str]


@cache
def templates() -> Environment:
    """The templates of this room; a name that a template does not get is an error."""
    environment = Environment(
        loader=PackageLoader("diptych.reports", "templates"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["data_uri"] = data_uri
    return environment


def data_uri(image: Image.Image) -> str:
    """A picture as a PNG within the document."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def render(template: str, **values: Any) -> str:
    """A template with its values."""
    return templates().get_template(template).render(**values)


def page(title: str, lead: str, sections: Sequence[tuple[str, Sequence[Markup]]], footer: str = "") -> str:
    """The whole document: a heading, a lead, sections of (heading, blocks), and a footer."""
    style = Markup(templates().get_template("style.css").render())  # our own, and no text of a user
    return render("page.html", title=title, lead=lead, sections=sections, footer=footer, style=style)


def write(path: Path, html: str) -> None:
    """Write the document whole or not at all."""
    write_text(path, html)


def _block(name: str, *values: Any) -> Markup:
    made = getattr(templates().get_template("blocks.html").module, name)(*values)
    assert isinstance(made, Markup), "autoescape is on"
    return made


def text(words: str) -> Markup:
    """A paragraph."""
    return _block("paragraph", words)


def commands(lines: Sequence[str]) -> Markup:
    """Commands to copy."""
    return _block("commands", lines)


def facts(values: Mapping[str, str]) -> Markup:
    """Large figures with what they are."""
    return _block("facts", values)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, total: bool = False) -> Markup:
    """A table; the first column holds names. With `total`, the last row stands out."""
    return _block("table", header, rows, total)


def gallery(images: Sequence[Image.Image], captions: Sequence[str]) -> Markup:
    """Pictures with captions, as many in a row as fit."""
    assert len(images) == len(captions), "a caption for each picture"
    return _block("gallery", images, captions)


def card(title: str, strips: Sequence[Strip], note: str = "") -> Markup:
    """A titled card of picture rows, say before and after."""
    return _block("card", title, strips, note)


def cards(each: Sequence[Markup]) -> Markup:
    """Cards side by side."""
    return _block("cards", each)


def chart(drawing: Markup, caption: str) -> Markup:
    """A drawing (SVG) with its caption."""
    return _block("chart", drawing, caption)
