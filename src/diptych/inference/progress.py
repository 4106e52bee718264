"""What a call that makes images tells on its way: how many images are made, and every step with a preview."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from diptych.inference.solvers import OnStep, Step

Progress = Callable[[int, int], None]
"""Called with (images made, images asked for)."""


@dataclass(frozen=True, kw_only=True)
class DrawingStep:
    """A solver step of a call: `number`, from 1, of all the `of` steps of the call; requests: whose images it makes, by
    their places in the call."""

    number: int
    of: int
    requests: tuple[int, ...]
    decode: Callable[[], list[Image.Image]]

    def preview(self) -> list[Image.Image]:
        """The images that the step points to; decoding them takes time."""
        return self.decode()


OnDrawingStep = Callable[[DrawingStep], None]


@dataclass
class StepCounter:
    """Counts the steps of a call over its batches and scales."""

    on_step: OnDrawingStep
    of: int
    done: int = 0

    def watch(self, requests: tuple[int, ...], decode: Callable[[Tensor], list[Image.Image]]) -> OnStep:
        """What a solver is to call while it makes images of these requests.

        Args:
            decode: latents (B, C, h, w) to images.
        """

        def report(step: Step) -> None:
            self.done += 1
            made = DrawingStep(number=self.done, of=self.of, requests=requests, decode=lambda: decode(step.data))
            self.on_step(made)

        return report
