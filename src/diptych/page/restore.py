"""A saved picture's settings as the values of a form, so that the same picture can be made again, or one near
it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from diptych.page.create import CreateTab
from diptych.page.edit import EditTab
from diptych.page.forms import EXPANSIONS
from diptych.page.shelf import in_words, note, settings_in, typed
from diptych.serving.service import Service

SHOWN = ("size", "steps", "cfg", "image_cfg", "negative", "edit", "batch_size")
"""Settings that have a part of their own on the page, or that change no picture."""


def wire(service: Service, create: CreateTab, edit: EditTab, tabs: gr.Tabs) -> None:
    """Let a picture that is dropped on the tab Create fill its form, or that of edits where it is one."""
    created = [create.prompt, create.model, *create.knobs.inputs()]
    edited = [edit.instruction, edit.model, *edit.knobs.inputs()]

    async def restored(path: str | None) -> list[Any]:
        nothing = [gr.skip()] * (len(created) + len(edited))
        if path is None:
            return [*nothing, gr.skip(), gr.skip(), gr.skip(), None]
        try:
            about = settings_in(path)
            size = picture_size(path)
            missing = about["model"] not in service.models.listed()
            given = await read(service, about, size)
        except Exception as error:
            return [*nothing, note(in_words(error), error=True), gr.skip(), gr.skip(), None]
        words = f"The settings of {Path(path).name} are restored."
        if missing:
            words += f" It was made by {about['model']}, which is not served here; the chosen model stays."
        if "instruction" in about:
            line = note(f"{words} Choose the picture that was edited.")
            return [*[gr.skip()] * len(created), *given, gr.skip(), line, gr.Tabs(selected="edit"), None]
        return [*given, *[gr.skip()] * len(edited), note(words), gr.skip(), gr.skip(), None]

    create.dropped.upload(
        restored, create.dropped, [*created, *edited, create.status, edit.status, tabs, create.dropped],
        api_visibility="private", show_progress="hidden",
    )  # fmt: skip


async def read(service: Service, about: dict[str, Any], size: tuple[int, int]) -> list[Any]:
    """Values of a form: words, model, and those of `Knobs.inputs`.

    Args:
        about: what a picture carries. size: its (width, height) in pixels.
    """
    settings: dict[str, Any] = about["settings"]
    edits = "instruction" in about
    name = about["model"] if about["model"] in service.models.listed() else service.models.names[0]
    async with service.models.use(name) as engine:
        usual = json.loads(json.dumps(asdict(engine.settings({}, edits=edits))))
    others = {key: value for key, value in settings.items() if key not in SHOWN and usual.get(key) != value}
    height, width = settings.get("size", (0, 0))
    # An edit has its picture's shape, unless a size was asked for.
    asked_size = f"{width}x{height}" if (width, height) == size else "auto"
    seed = "" if "noise" in about else str(about["seed"])
    model = name if about["model"] == name else gr.skip()
    second = [str(settings.get("image_cfg", ""))] if edits else []
    return [
        about.get("instruction", about.get("prompt", "")), model, asked_size, 1, str(settings.get("steps", "")),
        str(settings.get("cfg", "")), *second, seed, next(iter(EXPANSIONS)), settings.get("negative", ""),
        typed(others),
    ]  # fmt: skip


def picture_size(path: str) -> tuple[int, int]:
    """(width, height) of a picture's file."""
    with Image.open(path) as image:
        return image.size
