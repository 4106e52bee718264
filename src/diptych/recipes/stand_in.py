"""What a system reads in a trace of its memory: a tokenizer of four characters a token, and samples of a stage's sizes.

No file is read, so that the cost of a recipe can be told before anything was downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from diptych.core.errors import UserError
from diptych.core.image_sizes import both_sides
from diptych.core.sample import Message, Sample, Task
from diptych.parts.backbones.chat import CHATML
from diptych.parts.backbones.image_text import ImageTextBackbone
from diptych.recipes.recipe import StageSpec
from diptych.systems.base import System

PROMPT_TOKENS = 64
"""Tokens of a caption, an instruction or a question."""
ANSWER_TOKENS = 256
"""Tokens of an answer that is learned."""
CHARACTERS = 4
"""Of a token, about as many as a large vocabulary has for English; templates around a text count by them."""
UNKNOWN = "<|unknown|>"

IMAGE_TOKENS = {"internvl": "<IMG_CONTEXT>", "qwen2_5_vl": "<|image_pad|>"}
"""The token of an image slot, by kind of backbone, whose id its configuration names."""

MARKERS: tuple[str, ...] = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<|vision_start|>", "<|vision_end|>", "</s>",
)  # fmt: skip


def stand_in_tokenizer(image_token: str | None = None, image_id: int | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer of pieces of four characters, which are all one token, and of the markers of all chat templates; an
    image slot has the given id."""
    vocabulary = {token: number for number, token in enumerate([UNKNOWN, *MARKERS])}
    special = list(MARKERS)
    if image_token is not None and image_id is not None:
        vocabulary = {token: number + (number >= image_id) for token, number in vocabulary.items()}
        vocabulary[image_token] = image_id
        special.append(image_token)
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{CHARACTERS}}}"), "isolated")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=MARKERS[0], eos_token=MARKERS[2], unk_token=UNKNOWN
    )
    made.chat_template = CHATML
    return made


def lend_tokenizer(system: System) -> None:
    """Let a system that was built without files read texts, by the stand-in."""
    built: Any = system
    if system.kind == "bagel":
        built.tokenizer = stand_in_tokenizer()
        return
    backbone = built.backbone
    kind = str(built.origins["backbone"]["kind"])
    config = backbone.plain_config()
    tokenizer = stand_in_tokenizer(IMAGE_TOKENS.get(kind), config.get("image_token_id"))
    cls: Any = type(backbone)
    with torch.device("meta"):  # the processor comes with a model: this one's, where it can be given
        shared = isinstance(backbone, ImageTextBackbone)
        made = cls(backbone.model, tokenizer, None) if shared else cls.from_config(config, tokenizer)
    backbone.processor = made.processor


def task_counts(stage: StageSpec, count: int) -> dict[Task, int]:
    """Of `count` samples how many are of each of a stage's tasks, by its sources' weights: the largest remainder wins.

    Raises:
        UserError: a stage without sources.
    """
    if not stage.data.sources:
        raise UserError("a mixture needs at least one source")
    weights: dict[Task, float] = {}
    for source in stage.data.sources.values():
        weights[source.task] = weights.get(source.task, 0.0) + source.weight
    total = sum(weights.values())
    exact: dict[Task, float] = {task: count * weight / total for task, weight in weights.items()}
    counts: dict[Task, int] = {task: math.floor(share) for task, share in exact.items()}
    for task in sorted(exact, key=lambda task: counts[task] - exact[task]):
        if sum(counts.values()) < count:
            counts[task] += 1
    return counts


def stand_in_samples(stage: StageSpec, counts: Mapping[Task, int], length: float = 1.0) -> list[Sample]:
    """So many samples of each task, with images of a stage's size.

    length: of texts, as a share of the numbers of tokens above, for systems whose context is short.
    """
    height, width = both_sides(stage.data.size)
    image = torch.zeros(3, height, width)
    text, answer = ("x" * max(1, int(length * tokens) * CHARACTERS) for tokens in (PROMPT_TOKENS, ANSWER_TOKENS))
    turns = (Message(role="user", text=f"<image>{text}"), Message(role="assistant", text=answer))
    made: dict[Task, Sample] = {
        "image": Sample(id="image", task="image", image=image),
        "text_to_image": Sample(id="pair", task="text_to_image", image=image, text=text),
        "edit": Sample(id="edit", task="edit", image=image, text=text, context_images=(image,)),
        "understand": Sample(id="conversation", task="understand", context_images=(image,), messages=turns),
    }
    return [made[task] for task, number in counts.items() for _ in range(number)]
