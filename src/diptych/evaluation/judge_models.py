"""Judges on this machine: a vision-language model of transformers, or a Diptych model."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image

from diptych.core.errors import UserError
from diptych.evaluation.judge import Judge, Question, Reply
from diptych.inference.engine import Engine


def pictures(question: Question) -> list[Image.Image]:
    """The question's files as RGB."""
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in question.images]


class EngineJudge(Judge):
    """A Diptych model that understands."""

    def __init__(self, engine: Engine, max_tokens: int = 512) -> None:
        self.engine, self.max_tokens = engine, max_tokens

    def about(self) -> dict[str, Any]:
        return {"model": f"diptych:{self.engine.name}", "temperature": 0.0, "max_tokens": self.max_tokens}

    def ask(self, question: Question) -> Reply:
        tokens = 16 if question.choices else self.max_tokens
        answer = self.engine.ask(pictures(question), question.text, max_new_tokens=tokens)
        assert isinstance(answer, str), "one question, one answer"
        return Reply(text=answer, failure=None if answer.strip() else "an empty reply")


class TransformersJudge(Judge):
    """A model of transformers' image-text-to-text kind, decoded greedily.

    Where a question has choices (yes, no), the one with the highest probability of its first token is the answer, so
    there is always one.
    """

    def __init__(self, name: str, device: str = "cpu", max_tokens: int = 512, dtype: torch.dtype | None = None) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            self.processor: Any = AutoProcessor.from_pretrained(name)
            model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype or "auto")
        except (OSError, ValueError) as error:
            raise UserError(
                f"--judge hf:{name}: no model that reads pictures here ({str(error).splitlines()[0]})"
            ) from error
        self.model: Any = model.to(device).eval()
        self.name, self.max_tokens = name, max_tokens

    def about(self) -> dict[str, Any]:
        return {"model": f"hf:{self.name}", "temperature": 0.0, "max_tokens": self.max_tokens}

    @torch.no_grad()
    def ask(self, question: Question) -> Reply:
        images = pictures(question)
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
