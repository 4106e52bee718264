"""What a benchmark is to the harness: items, requests, outputs, rows, and a summary.

    items -> requests -> outputs (what a model makes of them) -> rows (what each output earned) -> summary (the scores)

A `PictureTask` has pictures for outputs, a `ReplyTask` replies. How outputs are kept, shared between processes, resumed
and scored once is the harness's affair (`harness.py`), the same for all.
"""

from __future__ import annotations

import abc
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from diptych.core.errors import UserError, attributed_to
from diptych.core.filenames import relative_name
from diptych.core.reading import read_text
from diptych.core.sample import Message, Sample
from diptych.data.imaging import from_pil, to_pil
from diptych.evaluation import intervals
from diptych.evaluation.download import Data
from diptych.evaluation.intervals import SHARE, Bounds, Weights
from diptych.evaluation.judge import Judge
from diptych.inference.engine import Engine

Row = dict[str, Any]
"""What is known of an output: `id`, `category`, `prompt`, `score` (None where there is none), `failure`, and more."""
Progress = Callable[[int, int], None]
"""Called with (items done, items in all)."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A prompt, an edit or a question.

    files: names of the pictures wanted, relative to the folder of pictures, in the official layout; unsafe names
    become `file_name`s. text: what the model reads where it is not the prompt itself. sources: opens the pictures to
    edit or to look at.
    position: decides the noise, together with the seed. size: (height, width) wanted, where the item says it.
    facts: what else the task knows.
    """

    id: str
    prompt: str
    category: str = "all"
    files: tuple[str, ...] = ()
    text: str | None = None
    sources: Callable[[], Sequence[Image.Image]] | None = None
    position: int = 0
    size: tuple[int, int] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", tuple(relative_name(file) for file in self.files))


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a model made of an item: a picture, or a reply.

    number: which of the item's pictures. key: its name within the task. digest: of the file or of the reply.
    images: as the model gave them, each (3, H, W), while they are in memory; labels: their names, where they have some.
    path: the picture's file. expansion: what the model wrote before it drew.
    """

    item: Item
    key: str
    number: int = 0
    digest: str = ""
    images: tuple[Tensor, ...] = ()
    path: Path | None = None
    reply: str | None = None
    expansion: str | None = None
    labels: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        """The picture's file."""
        assert self.path is not None, "a stored picture has a file"
        return self.path

    @property
    def finite(self) -> bool:
        return all(bool(torch.isfinite(image).all()) for image in self.images)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """scores: `overall`, its 95% `interval`, {"score", "interval", "count"} for each category, and what else papers
    print. rows: as results keep them. units: what counts as one when two runs are compared, each with `id`, `category`
    and `score`. about: how the scores are made of the rows. count: of what
    the overall score rests on, where that is not all that was asked for."""

    scores: dict[str, Any]
    rows: Sequence[Row]
    units: Sequence[Row]
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    count: int | None = None


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What tasks work with: the data, a judge, the device, pictures per batch, and names of weights.

    self_test: look at known pictures before a detector is believed. prompts: judge prompts by name, in place of ours.
    work: the folder for intermediate results. size: (height, width) of the model's pictures. n: pictures of a prompt,
    where a task leaves that open. limit: at most so many items. profile: of the words in which questions are put
    (`understanding.profiles`). max_new_tokens: of a reply, in place of the task's own. rewritten: prompts that a model
    reads in place of the published ones.
    """

    data: Data
    judge: Judge | None = None
    device: str = "cpu"
    batch_size: int = 16
    detector: str = "facebook/mask2former-swin-small-coco-instance"
    clip: str = "openai/clip-vit-large-patch14"
    inception: Path | None = None
    self_test: bool = True
    dpg_scoring: str = "fixed"
    prompts: Mapping[str, str] = field(default_factory=dict[str, str])
    work: Path = field(default_factory=Path)
    size: tuple[int, int] = (32, 32)
    n: int | None = None
    limit: int | None = None
    profile: str = "plain"
    max_new_tokens: int | None = None
    rewritten: Rewritten | None = None

    def require_judge(self, task: str) -> Judge:
        """The judge; UserError where none was given."""
        if self.judge is None:
            raise UserError(
                f"{task} needs a judge: --judge URL --judge-model NAME for an OpenAI-compatible endpoint, "
                "--judge hf:NAME for a local model of transformers, --judge diptych:MODEL for one of ours"
            )
        return self.judge


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """Prompts of the same items in other words. name: of their file; digest: of their texts."""

    name: str
    texts: Sequence[str]

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(list(self.texts)).encode()).hexdigest()[:12]

    @staticmethod
    def read(path: Path) -> Rewritten:
        """A file with a prompt on each line, or a JSON object with a `prompt` on each line (.jsonl)."""
        lines = [line for line in read_text(path).splitlines() if line.strip()]
        try:
            texts = [str(json.loads(line)["prompt"]) for line in lines] if path.suffix == ".jsonl" else lines
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: each line has to be a JSON object with a prompt") from error
        return Rewritten(name=path.name, texts=tuple(texts))

    def apply(self, task: str, items: Sequence[Item]) -> list[Item]:
        """All items of a task with these prompts; UserError where there are not as many."""
        if len(self.texts) != len(items):
            raise UserError(f"{self.name}: {len(self.texts)} prompts, but {task} has {len(items)} items")
        return [replace(item, text=text) for item, text in zip(items, self.texts, strict=True)]


class Task(abc.ABC):
    """One benchmark.

    kind: what an output is called. replies: whether outputs are texts. at_once: outputs are scored as the model gives
    them, before they are stored in 8 bits. sampled: outputs depend on a seed. divisible: whether a part of the items
    says anything. bounds: of a row's score. weights: how categories make the overall score.
    """

    name: str
    kind: ClassVar[str] = "pictures"
    replies: ClassVar[bool] = False
    at_once: ClassVar[bool] = False
    sampled: ClassVar[bool] = True
    divisible: ClassVar[bool] = True
    bounds: ClassVar[Bounds] = SHARE
    weights: Weights = "categories"

    def __init__(self, tools: Tools) -> None:
        self.tools = tools

    @abc.abstractmethod
    def items(self) -> list[Item]:
        """All items, in the published order."""

    def chosen(self, limit: int | None) -> list[Item]:
        """The items of a run: all, or at most `limit`, taken from the categories in turn, in their own order."""
        with attributed_to(f"{self.name}: its data"):
            return in_turn(self.items(), limit)

    @abc.abstractmethod
    def requests(self, items: Sequence[Item]) -> list[Sample]:
        """The items as a system reads them."""

    @abc.abstractmethod
    def outputs(
        self, engine: Engine, items: Sequence[Item], seed: int, progress: Progress | None, **options: Any
    ) -> Iterator[tuple[Item, list[Output]]]:
        """What a model makes of the items; those that it cannot be asked about are left out.

        Args:
            progress: called with the outputs that are done of these items. options: fields of `Sampling`.
        """

    @abc.abstractmethod
    def rows(self, outputs: Sequence[Output]) -> Iterator[tuple[Output, Row]]:
        """`score`, `failure` and `detail` of each output, in any order, as they come."""

    def summary(self, rows: Sequence[Row], items: Sequence[Item]) -> Summary:
        """The scores of rows; `items` are all that was asked for."""
        return Summary(scores=intervals.means(rows, self.weights, self.bounds), rows=rows, units=units(rows))

    @abc.abstractmethod
    def about(self) -> dict[str, Any]:
        """Everything that decides the scores of given outputs: models, prompts, convention."""

    @property
    def submits(self) -> bool:
        """Whether the outputs are scored elsewhere, and are written for it."""
        return False

    def write_submission(self, place: Path, outputs: Sequence[Output]) -> None:
        """Write outputs in the form that the benchmark's publisher scores."""
        raise NotImplementedError(f"{self.name}: is scored here")

    def made_with(self) -> dict[str, Any]:
        """Everything of the task that decides the outputs, beside the model and its sampling."""
        listed = [(item.id, item.text or item.prompt, item.position) for item in self.items()]
        return {"task": self.name, "prompts": hashlib.sha256(repr(listed).encode()).hexdigest()[:16]}

    def batch(self, engine: Engine, options: Mapping[str, Any]) -> int:
        """Items that are put to the model together."""
        return int(options.get("batch_size", engine.sampling.batch_size))


class PictureTask(Task):
    """A task whose outputs are pictures.

    images: drawn for each item. together: all images of an item make one picture (`arrange`), instead of one each.
    """

    images: int = 1
    together: ClassVar[bool] = False

    def requests(self, items: Sequence[Item]) -> list[Sample]:
        samples: list[Sample] = []
        for item in items:
            text = item.prompt if item.text is None else item.text
            context = tuple(from_pil(image) for image in item.sources()) if item.sources is not None else ()
            task = "edit" if context else "text_to_image"
            samples.append(Sample(id=item.id, task=task, text=text, context_images=context, size=item.size))
        return samples

    def outputs(
        self, engine: Engine, items: Sequence[Item], seed: int, progress: Progress | None, **options: Any
    ) -> Iterator[tuple[Item, list[Output]]]:
        expansions: list[str] = []
        made = engine.tensors(
            self.requests(items),
            n=self.images,
            seed=seed,
            positions=[item.position for item in items],
            progress=progress,
            expansions=expansions,
            **options,
        )
        each = len(made) // len(items)
        for at, item in enumerate(items):
            images = made[at * each : (at + 1) * each]
            groups = [tuple(images)] if self.together else [(image,) for image in images]
            written = expansions[at * self.images : (at + 1) * self.images] or [None] * len(groups)
            yield (
                item,
                [
                    Output(item=item, key=file, number=number, images=group, expansion=text)
                    for number, (file, group, text) in enumerate(zip(item.files, groups, written, strict=False))
                ],
            )

    def arrange(self, images: Sequence[Tensor]) -> Image.Image:
        """The picture of an output's images."""
        return to_pil(torch.nan_to_num(images[0]))

    def lay_out(self, folder: Path, item: Item) -> None:
        """Write what an official scorer wants beside the pictures of an item."""


class ReplyTask(Task):
    """A task whose outputs are a model's replies to questions, greedily written."""

    kind: ClassVar[str] = "questions"
    replies: ClassVar[bool] = True
    sampled: ClassVar[bool] = False
    max_new_tokens: int = 16

    def requests(self, items: Sequence[Item]) -> list[Sample]:
        samples: list[Sample] = []
        for item in items:
            context = tuple(from_pil(image) for image in item.sources()) if item.sources is not None else ()
            message = Message(role="user", text=item.prompt if item.text is None else item.text)
            samples.append(Sample(id=item.id, task="understand", messages=(message,), context_images=context))
        return samples

    @torch.no_grad()
    def outputs(
        self, engine: Engine, items: Sequence[Item], seed: int, progress: Progress | None, **options: Any
    ) -> Iterator[tuple[Item, list[Output]]]:
        asked = [(item, sample) for item in items if (sample := self.readable(item)) is not None]
        if not asked:
            return
        device = engine.system.device
        replies = engine.system.generate_text(
            [list(sample.messages) for _, sample in asked],
            [[image.to(device) for image in sample.context_images] for _, sample in asked],
            max_new_tokens=self.max_new_tokens,
        )
        for (item, _), reply in zip(asked, replies, strict=True):
            yield item, [Output(item=item, key=item.id, reply=reply)]

    def readable(self, item: Item) -> Sample | None:
        """An item's request, or None where its pictures cannot be read."""
        try:
            return self.requests([item])[0]
        except UserError:
            return None

    def made_with(self) -> dict[str, Any]:
        return {**super().made_with(), "max_new_tokens": self.max_new_tokens}


def in_turn(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` items, taken from the categories in turn; in their own order."""
    if limit is None or limit >= len(items):
        return list(items)
    by_category: dict[str, list[Item]] = {}
    for item in items:
        by_category.setdefault(item.category, []).append(item)
    turns = [item for row in itertools.zip_longest(*by_category.values()) for item in row if item is not None]
    kept = {item.id for item in turns[:limit]}
    return [item for item in items if item.id in kept]


def numbered(items: Sequence[Item]) -> list[Item]:
    """Items whose position is their place in the list."""
    return [replace(item, position=at) for at, item in enumerate(items)]


def units(rows: Sequence[Row]) -> list[Row]:
    """Rows with a score, as `compare` pairs them."""
    return [{name: row[name] for name in ("id", "category", "score")} for row in rows if row["score"] is not None]
