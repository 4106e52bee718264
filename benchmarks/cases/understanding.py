"""Questions about images, answered by a model with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from diptych.core.sample import IMAGE_PLACEHOLDER, Message
from diptych.recipes.build import build_system
from diptych.recipes.recipe import VARIANTS, SystemSpec, load_plain

try:
    from diptych.core.schema import read
except ModuleNotFoundError:  # where older revisions have it
    from diptych.recipes.schema import read  # type: ignore[no-redef]

QUESTIONS = ("What color is it?", "How many are there?", "Is there a circle?", "What is left of the square?")


def built(plain: dict[str, Any]) -> Any:
    return build_system(read(SystemSpec, plain, "", VARIANTS))


def questions(side: int = 32) -> dict[str, Callable[[], Any]]:
    """Eight questions about each of eight images of `side` px, at most 16 tokens an answer."""
    plain = copy.deepcopy(load_plain("toy/ovis_u1")["system"])
    system = built(plain).eval()
    images = torch.rand(8, 3, side, side) * 2 - 1
    conversations, pictures = [], []
    for image in images:
        for number in range(8):
            text = f"{IMAGE_PLACEHOLDER}\n{QUESTIONS[number % 4]} {'please ' * (number // 4)}"
            conversations.append([Message(role="user", text=text)])
            pictures.append([image])

    @torch.no_grad()
    def answer() -> Any:
        return system.generate_text(conversations, pictures, max_new_tokens=16)

    return {"ours": answer}
