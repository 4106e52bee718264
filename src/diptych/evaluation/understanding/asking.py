"""Puts a benchmark's questions to a model, keeps every reply, and scores them; a run that was stopped goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from diptych.core.errors import UserError
from diptych.core.sample import Message
from diptych.evaluation.journal import Journal
from diptych.evaluation.results import Progress
from diptych.evaluation.understanding.benchmarks import Benchmark, kept
from diptych.evaluation.understanding.judged import Judge
from diptych.evaluation.understanding.question import Question, question
from diptych.evaluation.understanding.scored import Row, Scored
from diptych.evaluation.understanding.table import Table
from diptych.inference.engine import Engine, from_pil


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question. id: stable between runs. pictures: reads the row's pictures."""

    id: str
    row: Row
    prompt: str
    pictures: Callable[[], list[Image.Image]]


@dataclass(kw_only=True)
class Asked:
    """Replies by item id, and why an item could not be asked."""

    replies: dict[str, str] = field(default_factory=dict[str, str])
    failed: dict[str, str] = field(default_factory=dict[str, str])


def items(benchmark: Benchmark, folder: Path, limit: int | None = None) -> list[Item]:
    """The questions of a benchmark whose files lie in `folder`.

    Args:
        limit: at most so many rows of each file, whole groups where rows count together.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    found: list[Item] = []
    for table in benchmark.tables(folder):
        at_hand = [at for at, row in enumerate(table.rows) if benchmark.split in (None, row.get("split"))]
        if not at_hand:
            raise UserError(f"{table.path}: no row of split {benchmark.split!r}")
        rows = [table.rows[at] for at in at_hand]
        names = _names(table)
        found += [_item(benchmark, table, at_hand[at], names) for at in kept(rows, limit, benchmark.together)]
    return found


def _names(table: Table) -> list[str]:
    """Names of the rows: the file and the index, which some files give to several rows."""
    often: Counter[str] = Counter()
    names: list[str] = []
    for row in table.rows:
        name = f"{table.path.stem}:{row['index']}"
        often[name] += 1
        names.append(name if often[name] == 1 else f"{name}#{often[name]}")
    return names


def _item(benchmark: Benchmark, table: Table, at: int, names: Sequence[str]) -> Item:
    row = table.rows[at]
    return Item(id=names[at], row=row, prompt=benchmark.prompt(row), pictures=lambda: table.pictures(at))


def ask(
    engine: Engine,
    questions: Sequence[Item],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> Asked:
    """The model's replies.

    Args:
        journal: replies; those that are there already are not asked for again, unless the prompt is another one now,
            and new ones are added batch by batch.
        progress: told how many of the questions are answered.
    """
    asked = known(questions, journal)
    left = [item for item in questions if item.id not in asked.replies]
    done = len(questions) - len(left)
    if progress is not None:
        progress(done, len(questions))
    for start in range(0, len(left), batch_size):
        group = [(item, found) for item in left[start : start + batch_size] if (found := read(item, asked)) is not None]
        replies = _replies(engine, [found for _, found in group], max_new_tokens)
        for (item, _), reply in zip(group, replies, strict=True):
            asked.replies[item.id] = reply
            if journal is not None:
                journal.add(item.id, {"prompt": item.prompt, "reply": reply})
        if progress is not None:
            progress(done + min(start + batch_size, len(left)), len(questions))
    return asked


def known(questions: Sequence[Item], journal: Journal | None) -> Asked:
    """The replies that a journal holds to these very questions."""
    asked = Asked()
    for item in questions if journal is not None else ():
        row = journal.rows.get(item.id) if journal is not None else None
        if row is not None and row["prompt"] == item.prompt:
            asked.replies[item.id] = row["reply"]
    return asked


def read(item: Item, asked: Asked) -> tuple[Question, list[Image.Image]] | None:
    """A question with its pictures; where one cannot be read, None, and `asked` says why."""
    try:
        pictures = item.pictures()
    except UserError as error:
        asked.failed[item.id] = str(error)
        return None
    placed = question(item.prompt, len(pictures))
    return placed, [pictures[at] for at in placed.order]


@torch.no_grad()
def _replies(engine: Engine, group: Sequence[tuple[Question, list[Image.Image]]], max_new_tokens: int) -> Sequence[str]:
    if not group:
        return []
    conversations = [[Message(role="user", text=placed.text)] for placed, _ in group]
    tensors = [[from_pil(picture).to(engine.system.device) for picture in pictures] for _, pictures in group]
    return engine.system.generate_text(conversations, tensors, max_new_tokens=max_new_tokens)


def score(benchmark: Benchmark, questions: Sequence[Item], asked: Asked, judge: Judge | None = None) -> Scored:
    """The score of replies; UserError where a judge is needed and none is given."""
    rows = [item.row for item in questions]
    replies = [asked.replies.get(item.id) for item in questions]
    if benchmark.score is not None:
        return benchmark.score(rows, replies)
    assert benchmark.score_judged is not None
    if judge is None:
        raise UserError(f"{benchmark.name} needs a judge")
    return benchmark.score_judged(rows, replies, judge)
