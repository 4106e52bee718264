"""Requests as an MLLM reads them: which words, which images, in which turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diptych.core.errors import UserError
from diptych.core.sample import IMAGE_PLACEHOLDER, Message, Sample

AssistantTurn = Literal["open", "prefixed", "closed"]
"""What follows the user's turn: an assistant's turn that is `open` and begins with the prefix; the same where there is
a prefix, and none else (`prefixed`); or a whole turn that says the prefix, where there is one (`closed`)."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """User turns by task; `{text}` is the caption or instruction. The wording is the MLLM's, not the user's.

    `<image>` stands for the context images, with a newline after it for each with a newline; where a turn has none,
    they stand first. A text of the user that says itself where its images stand takes their place in the turn.

    image: for unlabelled images, and for an instruction without text where `null` shows no image; "" where the system
        does not learn from unlabelled images. null: a request without text.
    system: the system turn, "" for none. system_dropped: that of prompts that training drops, None for the same.
    assistant_prefix: what the assistant's turn begins with, before the conditioner's tokens (OpenUni: "<img>").
    assistant_turn: see `AssistantTurn`.
    expansion: asks the MLLM to write out what a caption leaves open, to be drawn in the caption's place
    (`Sampling.prompt_expansion`).
    """

    text_to_image: str = "Generate an image: {text}"
    image: str = "Generate an image that is identical to the reference image: <image>"
    edit: str = "{text} <image>"
    null: str = "Generate an image."
    system: str = ""
    system_dropped: str | None = None
    assistant_prefix: str = ""
    assistant_turn: AssistantTurn = "open"
    expansion: str = ""

    def __post_init__(self) -> None:
        for name in ("text_to_image", "image", "edit", "null"):
            if name in ("text_to_image", "edit") and "{text}" not in getattr(self, name):
                raise UserError(f"prompts.{name}: {{text}} stands for what is asked, and is missing")
            if getattr(self, name).count(IMAGE_PLACEHOLDER) > 1:
                raise UserError(f"prompts.{name}: {IMAGE_PLACEHOLDER} stands for all images; write it once")

    def conversation(self, sample: Sample, images: int, *, dropped: bool = False) -> list[Message]:
        """The request of a sample of which so many images are shown; `dropped` where training took its text away."""
        system = self.system if not dropped or self.system_dropped is None else self.system_dropped
        turns = [Message(role="system", text=system)] if system else []
        turns.append(Message(role="user", text=self.user_turn(sample, images)))
        if self.assistant_turn == "closed" and self.assistant_prefix:
            turns.append(Message(role="assistant", text=self.assistant_prefix))
        return turns

    @property
    def opens(self) -> bool:
        """Whether the assistant's turn stays open."""
        return self.assistant_turn == "open" or (self.assistant_turn == "prefixed" and bool(self.assistant_prefix))

    @property
    def opening(self) -> str:
        """What an open assistant's turn begins with."""
        return self.assistant_prefix if self.opens else ""

    def user_turn(self, sample: Sample, images: int) -> str:
        """The user's turn for a sample of which so many images are shown.

        Raises:
            UserError: a text with another number of `<image>` than the sample has images.
        """
        # The turn of this task; one without text is the null turn, or the one that shows images.
        text = sample.text
        if sample.task == "image":
            turn = self.image
        elif text:
            turn = self.edit if sample.task == "edit" else self.text_to_image
        else:
            turn = self.image if sample.task == "edit" and IMAGE_PLACEHOLDER not in self.null else self.null
        mark = f"{IMAGE_PLACEHOLDER}\n" if f"{IMAGE_PLACEHOLDER}\n" in turn else IMAGE_PLACEHOLDER

        # A text that places its images itself.
        placed = text.count(IMAGE_PLACEHOLDER)
        if placed:
            if placed != len(sample.context_images):
                raise UserError(
                    f"{sample.id}: {placed} {IMAGE_PLACEHOLDER} placeholders but {len(sample.context_images)} images"
                )
            if images == placed:
                return turn.replace(mark, "").replace("{text}", text).strip()
            text = without_placeholders(text)

        # Else the images stand at the turn's mark, or first.
        if mark not in turn:
            return IMAGE_PLACEHOLDER * images + turn.replace("{text}", text)
        return turn.replace(mark, mark * images).replace("{text}", text)


def without_placeholders(text: str) -> str:
    """A text of the user whose images are not shown."""
    return " ".join(text.replace(IMAGE_PLACEHOLDER, " ").split()) if IMAGE_PLACEHOLDER in text else text
