"""Words of requests: placeholders and images agree in every branch of guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.core.errors import UserError
from diptych.core.sample import Sample
from diptych.systems.preparing import without
from diptych.systems.presets import OmniGen2Settings, OvisPrompts
from diptych.systems.prompts import Prompts

WORDINGS = {
    "composed": Prompts(),
    "newlines": Prompts(edit="<image>\n{text}. what is where?", image="<image>\nwhat is where?"),
    "omnigen2": OmniGen2Settings().common().prompts,
    "ovis_u1": OvisPrompts(),
}


def edit(text: str, images: int) -> Sample:
    return Sample(id="edit", task="edit", text=text, context_images=(torch.zeros(3, 8, 8),) * images)


@pytest.mark.parametrize("wording", WORDINGS)
@given(
    images=st.integers(1, 4), words=st.lists(st.sampled_from(["make", "it", "red"]), max_size=4), places=st.booleans()
)
@settings(max_examples=30, deadline=None)
def test_placeholders_and_images_agree_in_every_branch(
    wording: str, images: int, words: list[str], places: bool
) -> None:
    prompts = WORDINGS[wording]
    text = " ".join([*words, *(["<image>"] * images if places else [])])
    for dropped in (None, "text", "images", "text_and_images"):
        sample = edit(text, images)
        branch: Any = sample if dropped is None else without(sample, dropped)  # type: ignore[arg-type]
        shown = len(branch.context_images)
        assert prompts.user_turn(branch, shown).count("<image>") == shown
        assert "{text}" not in prompts.user_turn(branch, shown)
        assert prompts.user_turn(branch, 0).count("<image>") == 0  # an MLLM that is shown none


@pytest.mark.parametrize(("text", "images"), [("<image> on <image>", 1), ("like <image>", 2)])
def test_a_text_with_other_placeholders_than_images_is_refused_by_name(text: str, images: int) -> None:
    with pytest.raises(UserError, match=rf"edit: {text.count('<image>')} <image> placeholders but {images} images"):
        Prompts().user_turn(edit(text, images), images)
    with pytest.raises(UserError, match="caption: 1 <image> placeholders but 0 images"):
        Prompts().user_turn(Sample(id="caption", task="text_to_image", text="a sign that reads <image>"), 0)


def test_a_text_keeps_the_places_of_its_images() -> None:
    sample = edit("put <image> on <image>", 2)
    assert WORDINGS["newlines"].user_turn(sample, 2) == "put <image> on <image>. what is where?"
    assert WORDINGS["composed"].user_turn(sample, 2) == "put <image> on <image>"


def test_images_stand_at_the_mark_or_first() -> None:
    assert WORDINGS["newlines"].user_turn(edit("more red", 2), 2) == "<image>\n<image>\nmore red. what is where?"
    assert WORDINGS["omnigen2"].user_turn(edit("more red", 2), 2) == "<image><image>more red"
    assert WORDINGS["composed"].user_turn(edit("", 2), 2).endswith("the reference image: <image><image>")


def test_a_turn_with_two_marks_is_refused() -> None:
    with pytest.raises(UserError, match=r"prompts.edit: <image> stands for all images"):
        Prompts(edit="<image> and <image>: {text}")
