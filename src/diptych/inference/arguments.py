"""What Python callers give: texts, whole numbers and seeds of any library's types, or a UserError that names them."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from diptych.core.errors import UserError

ELSEWHERE = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg",
    "true_cfg_scale": "cfg",
    "text_guidance_scale": "cfg",
    "cfg_text_scale": "cfg",
    "image_guidance_scale": "image_cfg",
    "cfg_img_scale": "image_cfg",
    "negative_prompt": "negative",
    "height": "size=(height, width)",
    "width": "size=(height, width)",
    "num_images_per_prompt": "n",
    "num_images": "n",
    "callback": "on_step",
    "callback_on_step_end": "on_step",
    "temperature": "prompt_expansion_temperature",
    "scheduler": "solver",
}
"""Arguments of other libraries' pipelines, and what is given here in their place."""


def texts(value: object, what: str) -> list[str]:
    """One text or several as a list; UserError for what is none, or is empty. what: its name in messages."""
    several = isinstance(value, Iterable) and not isinstance(value, str)
    given: Any = value
    listed: list[Any] = list(given) if several else [given]
    for place, text in enumerate(listed):
        name = f"{what} {place}" if several else f"the {what}"
        if not isinstance(text, str):
            raise UserError(f"{name} must be a text, not {_kind(text)}")
        if not text.strip():
            raise UserError(f"{name} is empty")
    return listed


def whole(value: object, name: str, minimum: int | None = None) -> int:
    """A whole number of any type (a tensor of one, too); UserError for another value, or one below `minimum`."""
    if isinstance(value, torch.Tensor) and value.ndim == 0 and not value.is_floating_point():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise UserError(f"{name} must be a whole number, not {_kind(value)}")
    if minimum is not None and value < minimum:
        raise UserError(f"{name} must be at least {minimum}, not {value}")
    return int(value)


def seeds(value: object) -> int | list[int]:
    """A seed, or the list of several that any sequence, array or tensor holds."""
    if not isinstance(value, Iterable) or isinstance(value, str) or getattr(value, "ndim", 1) == 0:
        return whole(value, "seed")
    return [whole(seed, f"seed {place}") for place, seed in enumerate(value)]


def drawn_seeds(generator: torch.Generator | Sequence[torch.Generator], count: int) -> list[int]:
    """Seeds of `count` images: all from one generator, or each from a generator of its own."""
    single = isinstance(generator, torch.Generator)
    given: list[Any] = [generator] if single or not isinstance(generator, Sequence) else list(generator)
    for entry in given:
        if not isinstance(entry, torch.Generator):
            raise UserError(f"generator must be a torch.Generator, or a list of them, not {_kind(entry)}")
    if not single and len(given) != count:
        raise UserError(f"{len(given)} generators for {count} images; give one, or one for each image")
    draws = [(given[0], count)] if single else [(entry, 1) for entry in given]
    return [
        seed
        for entry, number in draws
        for seed in torch.randint(1 << 62, (number,), generator=entry, device=entry.device).tolist()
    ]


def check_options(options: Iterable[str]) -> None:
    """UserError for an option that other libraries have by another name."""
    for name in options:
        if name in ELSEWHERE:
            raise UserError(f"unknown option {name!r}; it is {ELSEWHERE[name]} here")


def _kind(value: object) -> str:
    """A value as messages show it: itself where it is short, else its type."""
    shown = repr(value)
    return shown if len(shown) <= 40 else f"a value of type {type(value).__name__}"
