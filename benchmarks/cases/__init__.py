"""The cases of `run.py`, by name. Each gives its ways of doing one thing: "ours", and the peers that are installed.

A case uses of the library only what older revisions have as well, or asks for what is newer before it uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

Ways = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    """about: one line. module, function: what builds it, given `options`; imported when it is made, so that a case
    that an older revision does not have leaves the others alone."""

    about: str
    module: str
    function: str
    options: dict[str, Any]

    def make(self) -> Ways:
        """The case's ways."""
        return getattr(import_module(f"cases.{self.module}"), self.function)(**self.options)


def _case(about: str, function: str, **options: Any) -> Case:
    module, name = function.split(".")
    return Case(about, module, name, options)


CASES: dict[str, Case] = {
    "omnigen2-draw": _case("256 tokens, prompts 60/25", "sampling.omnigen2", references=0, images=False),
    "omnigen2-edit-1-text": _case("an edit, text guidance", "sampling.omnigen2", references=1, images=False),
    "omnigen2-edit-1": _case("an edit, both guidances", "sampling.omnigen2", references=1, images=True),
    "omnigen2-edit-3": _case("an edit of 3 images, both guidances", "sampling.omnigen2", references=3, images=True),
    "qwen-image": _case("256 tokens, prompts 60/12, against diffusers", "pipelines.qwen_image"),
    "sana": _case("256 tokens, prompts 60/12, against diffusers", "pipelines.sana"),
    "sd3": _case("256 tokens, prompts 77/77, against diffusers", "pipelines.sd3"),
    "bagel-draw": _case("256 tokens, a prompt of 200 tokens", "bagel.guided", kind="prompt of 200"),
    "bagel-edit": _case("an edit with 1,000 context tokens, both guidances", "bagel.guided", kind="edit of 1000"),
    "openuni-step": _case("a training step of OpenUni at small width", "query_steps.openuni"),
    "metaquery-step": _case("a training step of MetaQuery at small width", "query_steps.metaquery"),
    "compiled": _case("an MMDiT of width 512, forward and backward, against run.compile: regional", "compiled.mmdit"),
    "answers": _case("64 questions about 8 images of 32 px, toy Ovis-U1", "understanding.questions"),
    "answers-128": _case("64 questions about 8 images of 128 px, toy Ovis-U1", "understanding.questions", side=128),
}
