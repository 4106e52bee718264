"""The parts of a form that several tabs have, and their values as checked fields of the API, so that the page refuses
what the API refuses, in its words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from diptych.page.shelf import other_settings
from diptych.serving.fields import read_fields
from diptych.serving.images_api import EDIT_FIELDS, FIELDS, draw_call
from diptych.serving.service import DrawCall, Service

EXPANSIONS = {"the model's own": None, "on": True, "off": False}
SIZES = ["auto", "64x64", "256x256", "512x512", "1024x1024", "1024x768", "768x1024"]
PARTIALS = 3
"""Estimates that are shown on the way."""


@dataclass
class Knobs:
    """Settings of a drawing, as the page's parts. What is empty is the model's own."""

    size: gr.Dropdown
    count: gr.Slider
    steps: gr.Textbox
    guidance: gr.Textbox
    image_guidance: gr.Textbox | None
    seed: gr.Textbox
    expansion: gr.Radio
    negative: gr.Textbox
    others: gr.Textbox

    def inputs(self) -> list[Any]:
        """The parts in the order of `values`."""
        parts = [self.size, self.count, self.steps, self.guidance, self.image_guidance, self.seed, self.expansion]
        return [part for part in [*parts, self.negative, self.others] if part is not None]


def line(label: str, placeholder: str, **more: Any) -> gr.Textbox:
    """A part of one line. Numbers are typed as texts too: Gradio's own part for numbers shows 0 where there is none."""
    return gr.Textbox(label=label, placeholder=placeholder, max_lines=1, min_width=120, **more)


def knobs(edits: bool) -> Knobs:
    """The settings of a drawing; those of edits have a second guidance."""
    default = "the model's own"
    with gr.Row():
        count = gr.Slider(1, 10, value=1, step=1, label="Count", min_width=120)
        seed = line("Seed", "a new one")
    with gr.Accordion("Settings", open=False):
        negative = gr.Textbox(label="Negative prompt", placeholder="what guidance leads away from", max_lines=3)
        with gr.Row():
            size = gr.Dropdown(
                SIZES, value="auto", label="Size, width x height", allow_custom_value=True, min_width=120
            )
            steps = line("Steps", default)
        with gr.Row():
            guidance = line("Text guidance", default)
            image_guidance = line("Image guidance", default) if edits else None
        expansion = gr.Radio(list(EXPANSIONS), value=default, label="Let the model write before it draws")
        others = gr.Textbox(label="Other settings", placeholder="solver=heun\ntimestep_shift=2.0", lines=2, max_lines=8,
                            info="one name=value a line, of the sampling settings in docs/recipes.md")  # fmt: skip
    return Knobs(size, count, steps, guidance, image_guidance, seed, expansion, negative, others)


def values(size: str, count: float, *rest: str) -> dict[str, Any]:
    """The values of `Knobs.inputs` as fields, without those that are empty."""
    steps, guidance, *image_guidance, seed, expansion, negative, others = rest
    given: dict[str, Any] = {
        "size": size or "auto",
        "n": int(count) if count == int(count) else count,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "image_guidance_scale": image_guidance[0] if image_guidance else "",
        "seed": seed,
        "think": EXPANSIONS.get(expansion),
        "negative_prompt": negative,
        "sampling": other_settings(others or "") or None,
    }
    return filled(given)


def filled(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields without those that were left empty."""
    stripped = {name: value.strip() if isinstance(value, str) else value for name, value in fields.items()}
    return {name: value for name, value in stripped.items() if value is not None and value != ""}


def asked(service: Service, model: str, prompt: str, given: dict[str, Any], **more: Any) -> DrawCall:
    """A drawing as the API would be asked for it; `more` are the pictures and the mask of an edit."""
    table = EDIT_FIELDS if more.get("images") else FIELDS
    stream = {"stream": True, "partial_images": PARTIALS}
    fields = read_fields({"model": model, "prompt": prompt, **stream, **given}, table, form=True)
    return draw_call(service, fields, **more)


def choose_model(service: Service, name: str, label: str = "Model", place: int = 0) -> gr.Dropdown:
    """A choice of the served models. name: of the part, for styles and tests."""
    names = service.models.listed()
    return gr.Dropdown(names, value=names[min(place, len(names) - 1)], label=label, elem_id=name)
