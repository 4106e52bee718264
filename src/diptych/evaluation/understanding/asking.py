"""Puts a benchmark's questions to a model, keeps every reply, and scores them; a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from diptych.core.errors import UserError
from diptych.core.sample import Message
from diptych.evaluation.results import Judged, Progress, TaskResult
from diptych.evaluation.understanding.benchmarks import Benchmark, kept
from diptych.evaluation.understanding.judged import Judge
from diptych.evaluation.understanding.question import Question, question
from diptych.evaluation.understanding.scored import Row, Scored
from diptych.evaluation.understanding.table import Table
from diptych.inference.engine import Engine, from_pil

CHUNK = 1 << 20


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
        found += [_item(benchmark, table, at_hand[at]) for at in kept(rows, limit, benchmark.together)]
    return found


def _item(benchmark: Benchmark, table: Table, at: int) -> Item:
    row = table.rows[at]
    name = f"{table.path.stem}:{row['index']}"
    return Item(id=name, row=row, prompt=benchmark.prompt(row), pictures=lambda: table.pictures(at))


def check_files(benchmark: Benchmark, folder: Path) -> dict[str, str]:
    """Files that are not the published ones, with their MD5; parquet files, which have no published sum, are named."""
    strange: dict[str, str] = {}
    for file in benchmark.files:
        path = folder / file.name
        if not path.is_file():
            strange[file.name] = "another format (.parquet): no published checksum"
            continue
        digest = hashlib.md5(usedforsecurity=False)
        with path.open("rb") as data:
            while chunk := data.read(CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != file.md5:
            strange[file.name] = f"MD5 {digest.hexdigest()}, published {file.md5}"
    return strange


def ask(
    engine: Engine,
    questions: Sequence[Item],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    record: Path | None = None,
    progress: Progress | None = None,
) -> Asked:
    """The model's replies.

    Args:
        record: JSON lines of replies; those that are there already are not asked again, and new ones are appended
            batch by batch. A line of another prompt is asked again.
    """
    asked = Asked()
    if record is not None and record.is_file():
        prompts = {item.id: item.prompt for item in questions}
        for row in _lines(record):
            if row.get("id") in prompts and row.get("prompt") == prompts[row["id"]] and isinstance(row["reply"], str):
                asked.replies[row["id"]] = row["reply"]
    left = [item for item in questions if item.id not in asked.replies]
    for start in range(0, len(left), batch_size):
        group = [(item, read) for item in left[start : start + batch_size] if (read := _read(item, asked)) is not None]
        for (item, _), reply in zip(group, _replies(engine, [read for _, read in group], max_new_tokens), strict=True):
            asked.replies[item.id] = reply
        if record is not None and group:
            record.parent.mkdir(parents=True, exist_ok=True)
            with record.open("a", encoding="utf-8") as lines:
                for item, _ in group:
                    row = {"id": item.id, "prompt": item.prompt, "reply": asked.replies[item.id]}
                    lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        if progress is not None:
            progress(len(questions) - len(left) + min(start + batch_size, len(left)), len(questions))
    return asked


def _lines(record: Path) -> Iterator[Mapping[str, str]]:
    """The whole lines of a record; a last line that was cut short is cut off, so that new ones start clean."""
    text = record.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with record.open("r+b") as lines:
            lines.truncate(len(whole))
    for number, line in enumerate(whole.decode().split("\n")[:-1], 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{record}:{number}: not JSON ({error.msg})") from error


def _read(item: Item, asked: Asked) -> tuple[Question, list[Image.Image]] | None:
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


def run(
    engine: Engine,
    benchmark: Benchmark,
    folder: Path,
    *,
    judge: Judge | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    record: Path | None = None,
    progress: Progress | None = None,
) -> TaskResult:
    """One benchmark on a model: questions asked, replies recorded and scored.

    Scores hold `overall` with its `interval`, `unit`, `convention`, every other figure, `questions`, what is `missing`
    (by id, with the reason), `unread` replies and ids the judge `failed` on; `comparable` is False with a limit, with
    anything missing or failed, or with files other than the published ones (`files`).
    """
    if benchmark.score_judged is not None and judge is None:
        raise UserError(f"{benchmark.name} needs a judge")
    questions = items(benchmark, folder, limit)
    asked = ask(
        engine,
        questions,
        max_new_tokens=benchmark.max_new_tokens,
        batch_size=batch_size,
        record=record,
        progress=progress,
    )
    return result(benchmark, questions, asked, score(benchmark, questions, asked, judge), folder, limit)


def result(
    benchmark: Benchmark, questions: Sequence[Item], asked: Asked, scored: Scored, folder: Path, limit: int | None
) -> TaskResult:
    """A score with all that a reader must know beside it."""
    strange = check_files(benchmark, folder)
    failed = [questions[at].id for at in scored.failed]
    scores = {
        "overall": scored.overall,
        "interval": list(scored.interval()),
        "unit": scored.unit,
        "convention": scored.convention,
        "figures": scored.figures,
        "questions": len(questions),
        "missing": asked.failed,
        "unread": scored.unread,
        "judge_failed": failed,
        "files": strange,
        "comparable": limit is None and not asked.failed and not failed and not strange,
    }
    samples = [
        Judged(
            row={
                "id": item.id,
                "category": str(item.row.get("category", benchmark.name)),
                "prompt": item.prompt,
                "answer": item.row.get("answer"),
                "reply": asked.replies.get(item.id),
                "read": read,
                "value": value,
            },
            correct=value == 1,
        )
        for item, read, value in zip(questions, scored.read, scored.values, strict=True)
    ]
    return TaskResult(task=benchmark.name, scores=scores, samples=samples, failed=len(asked.failed) + len(failed))
