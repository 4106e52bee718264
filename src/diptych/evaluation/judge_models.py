"""Judges on this machine: a vision-language model of transformers, or a Diptych model."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from diptych.data.imaging import UNREADABLE
from diptych.evaluation.download import pinned_model
from diptych.evaluation.judge import Judge, Question, Reply
from diptych.evaluation.scorers import load_scorer
from diptych.inference.engine import Engine


def pictures(question: Question) -> list[Image.Image]:
    """The question's files as RGB; UnreadablePicture where one is none."""
    try:
        return [Image.open(io.BytesIO(data)).convert("RGB") for data in question.images]
    except UNREADABLE as error:
        raise UnreadablePicture(type(error).__name__) from error


class UnreadablePicture(Exception):
    """A picture of a question cannot be decoded."""


def answered(ask: Callable[[list[Image.Image]], Reply], question: Question) -> Reply:
    """What `ask` makes of the pictures; a failure where one is broken or the model cannot take them."""
    try:
        return ask(pictures(question))
    except UnreadablePicture as error:
        return Reply(failure=f"not a readable picture ({error})")
    except (ValueError, RuntimeError, IndexError) as error:  # too many tokens, a size that the model does not take
        return Reply(failure=f"the judge's model stopped ({first_line(error)})", transient=True)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class EngineJudge(Judge):
    """A Diptych model that understands."""

    def __init__(self, engine: Engine, max_tokens: int = 512) -> None:
        self.engine, self.max_tokens = engine, max_tokens

    def about(self) -> dict[str, Any]:
        return {"model": f"diptych:{self.engine.name}", "temperature": 0.0, "max_tokens": self.max_tokens}

    def ask(self, question: Question) -> Reply:
        return answered(lambda images: self._ask(question, images), question)

    def _ask(self, question: Question, images: list[Image.Image]) -> Reply:
        tokens = 16 if question.choices else self.max_tokens
        answer = self.engine.ask(images, question.text, max_new_tokens=tokens)
        assert isinstance(answer, str), "one question, one answer"
        return Reply(text=answer, failure=None if answer.strip() else "an empty reply")


class TransformersJudge(Judge):
    """A model of transformers' image-text-to-text kind, decoded greedily.

    Where a question has choices (yes, no), the one with the highest probability of its first token is the answer, so
    there is always one.
    """

    def __init__(
        self,
        name: str,
        device: str = "cpu",
        max_tokens: int = 512,
        dtype: torch.dtype | None = None,
        *,
        allow_unpinned: bool = False,
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        what = f"--judge hf:{name}"
        place, commit = pinned_model(name, "--judge hf:", allow_unpinned=allow_unpinned)
        self.processor: Any = load_scorer(AutoProcessor, place, what, revision=commit)
        model: Any = load_scorer(AutoModelForImageTextToText, place, what, revision=commit, dtype=dtype or "auto")
        self.model: Any = model.to(device).eval()
        self.name, self.max_tokens = name, max_tokens

    def about(self) -> dict[str, Any]:
        return {"model": f"hf:{self.name}", "temperature": 0.0, "max_tokens": self.max_tokens}

    @torch.no_grad()
    def ask(self, question: Question) -> Reply:
        return answered(lambda images: self._ask(question, images), question)

    def _ask(self, question: Question, images: list[Image.Image]) -> Reply:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question.text}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(text=[text], images=images or None, return_tensors="pt").to(self.model.device)
        if question.choices:
            logits = self.model(**inputs).logits[0, -1]
            return Reply(text=max(question.choices, key=lambda word: float(logits[self._first(word)].max())))
        made = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        new = made[0, inputs["input_ids"].shape[1] :]
        answer = self.processor.decode(new, skip_special_tokens=True)
        if len(new) >= self.max_tokens:
            return Reply(text=answer, failure=f"cut off after {self.max_tokens} tokens")
        return Reply(text=answer, failure=None if answer.strip() else "an empty reply")

    def _first(self, word: str) -> list[int]:
        """First tokens of a word as it may stand at the start of an answer."""
        tokenizer = self.processor.tokenizer
        forms = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
        return sorted({tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in forms})
