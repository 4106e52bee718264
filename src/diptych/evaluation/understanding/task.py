"""A published benchmark of understanding as a task: questions from its files, replies, and its own scorer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from diptych.core.files import write_bytes
from diptych.core.sample import Message, Sample
from diptych.data.imaging import from_pil
from diptych.evaluation.download import STATED, Data, File, check, file_digest
from diptych.evaluation.judge import Judge, Question, Reply, lasting
from diptych.evaluation.judging import failed, judge_about, judged, prompt_label, wording
from diptych.evaluation.task import Item, Output, ReplyTask, Row, Summary, Tools
from diptych.evaluation.understanding import asking
from diptych.evaluation.understanding.benchmarks import Benchmark
from diptych.evaluation.understanding.judged import Reading
from diptych.evaluation.understanding.profiles import PLAIN, PROFILES
from diptych.evaluation.understanding.question import question
from diptych.evaluation.understanding.scored import Scored
from diptych.evaluation.understanding.submission import NAME, submission
from diptych.inference.engine import Engine

ATTEMPTS = 3
"""How often a judge is asked the same before an answer that cannot be used is a failure."""
BATCH = 8
RESERVED = ("overall", "interval", "figures", "unread", "questions", "missing", "failed", "notes", "about")
"""Names in a task's entry of results.json that no category may take."""


class Understanding(ReplyTask):
    """One of `benchmarks.BENCHMARKS`. Replies are read by the benchmark's rules, or by a judge; a question without a
    reply counts as wrong, one on which the judge failed is left out."""

    def __init__(self, benchmark: Benchmark, tools: Tools) -> None:
        super().__init__(tools)
        self.benchmark = benchmark
        self.name = benchmark.name
        self.profile = None if tools.profile == PLAIN else PROFILES[tools.profile]
        limit = benchmark.max_new_tokens if self.profile is None else self.profile.max_new_tokens
        self.max_new_tokens = tools.max_new_tokens or limit or benchmark.max_new_tokens

    @cached_property
    def located(self) -> tuple[Path, dict[str, str]]:
        """The folder of the benchmark's files, and what each file is."""
        return located(self.benchmark, self.tools.data)

    @cached_property
    def questions(self) -> list[Item]:
        return asking.items(self.benchmark, self.located[0], profile=self.profile)

    def items(self) -> list[Item]:
        return self.questions

    def chosen(self, limit: int | None) -> list[Item]:
        """At most `limit` rows of each file, whole groups where rows count together."""
        return self.questions if limit is None else self._limited(limit)

    def _limited(self, limit: int) -> list[Item]:
        return asking.items(self.benchmark, self.located[0], limit, self.profile)

    def requests(self, items: Sequence[Item]) -> list[Sample]:
        """Raises UserError where a picture cannot be read."""
        samples: list[Sample] = []
        for item in items:
            pictures = list(item.sources()) if item.sources is not None else []
            placed = question(item.prompt, len(pictures))
            context = tuple(from_pil(pictures[at]) for at in placed.order)
            message = Message(role="user", text=placed.text)
            samples.append(Sample(id=item.id, task="understand", messages=(message,), context_images=context))
        return samples

    def rows(self, outputs: Sequence[Output]) -> Iterator[tuple[Output, Row]]:
        """What each reply was read as, `said`; the score follows from all of them."""
        reading = self.benchmark.reading
        prompts: dict[str, str] = {}
        for output in outputs:
            prompt = (
                None
                if reading is None
                else reading.prompt(wording(self.tools, reading.name), output.item.facts["row"], output.reply or "")
            )
            if prompt is None:
                yield output, {"score": None, "said": output.reply}
            else:
                prompts[output.key] = prompt
        if reading is None or not prompts:
            return
        judge = self.tools.require_judge(self.name)
        asked = [output for output in outputs if output.key in prompts]
        yield from judged(judge, asked, lambda output: put(judge, prompts[output.key], reading))

    def summary(self, rows: Sequence[Row], items: Sequence[Item]) -> Summary:
        known = {row["id"]: row for row in rows}
        table = [item.facts["row"] for item in items]
        said = [known[item.id].get("said") if item.id in known else None for item in items]
        failures: dict[int, str] = {
            at: known[item.id]["failure"]
            for at, item in enumerate(items)
            if item.id in known and known[item.id]["failure"] is not None
        }
        if self.benchmark.reading is not None:
            scored = self.benchmark.reading.score(table, said, failures)
        else:
            assert self.benchmark.score is not None, "a benchmark has a scorer or a judge"
            scored = self.benchmark.score(table, said)
        categories = {
            (f"category {name}" if name in RESERVED else name): each for name, each in scored.categories().items()
        }
        missing = sum(item.id not in known for item in items)
        scores = {
            **categories,
            "overall": scored.overall,
            "interval": scored.interval(),
            "figures": scored.figures,
            "unread": scored.unread - missing - len(failures),
        }
        about = {
            "convention": scored.convention,
            "unit": scored.unit,
            "prompts": self.tools.profile,
            "max_new_tokens": self.max_new_tokens,
            **pairing(scored),
        }
        units = [
            {
                "id": items[unit[0]].id,
                "category": category,
                "score": worth,
                "questions": [items[at].id for at in unit],
            }
            for unit, category, worth in scored.earned(table)
            if worth is not None
        ]
        return Summary(scores=scores, rows=samples(items, known, scored), units=units, about=about)

    def about(self) -> dict[str, Any]:
        judging: dict[str, Any] = {}
        if self.benchmark.reading is not None:
            label = prompt_label(self.tools, self.benchmark.reading.name)
            judging = {"judge_prompt": label, **judge_about(self.tools.require_judge(self.name))}
        return {"files": "; ".join(self.located[1].values()), **judging}

    @property
    def submits(self) -> bool:
        """The publisher keeps the answers, as of MMBench's test splits."""
        return self.benchmark.reading is None and not any(item.facts["row"].get("answer") for item in self.questions)

    def write_submission(self, place: Path, outputs: Sequence[Output]) -> None:
        rows = [output.item.facts["row"] for output in outputs]
        write_bytes(place / NAME, submission(rows, [output.reply or "" for output in outputs]))

    def made_with(self) -> dict[str, Any]:
        return {**super().made_with(), "profile": self.tools.profile, "files": self.located[1]}

    def batch(self, engine: Engine, options: Mapping[str, Any]) -> int:
        return int(options.get("batch_size", BATCH))


def put(judge: Judge, prompt: str, reading: Reading) -> Row:
    """A judge's reading of one reply; a reading that cannot be used is asked for again."""
    reply = Reply(failure="not asked")
    for attempt in range(ATTEMPTS):
        reply = judge.ask(Question(text=prompt, attempt=attempt))
        if reply.failure is None and reading.usable(reply.text):
            return {"score": None, "said": reply.text}
        if not lasting(reply):
            break
    return failed(reply.failure or f"cannot be used: {reply.text[:60]!r}", [reply])


def located(benchmark: Benchmark, data: Data) -> tuple[Path, dict[str, str]]:
    """The folder of a benchmark's files, fetched and checked, and what each file is.

    A parquet file of the same name stands for a table; it has no published checksum, so the one seen first is noted.
    """
    folder = data.folder / benchmark.folder
    files: dict[str, str] = {}
    for file in benchmark.files:
        published = File(url=file.url, sha256=None, md5=file.md5, licence=STATED)
        other = (folder / file.name).with_suffix(".parquet")
        if other.is_file() and not (folder / file.name).is_file():
            check(replace(published, md5=None), other)
            digest = file_digest(other)[:12]
            files[file.name] = f"{other.name}, SHA-256 {digest}..., not compared with any published sum"
        else:
            data.get(benchmark.folder, published)
            files[file.name] = f"{file.name}, MD5 {file.md5} as published"
    return folder, files


def pairing(scored: Scored) -> dict[str, Any]:
    """How `diptych compare` makes an overall figure of what single units earned."""
    if scored.total is None:
        return {"overall_is": "items", "compared_is": "the share of right replies, not the headline figure"}
    whole = scored.total if isinstance(scored.total, str) else dict(scored.total)
    return {"overall_is": whole, **({"scale": scored.scale} if scored.scale != 1 else {})}


def samples(items: Sequence[Item], known: Mapping[str, Row], scored: Scored) -> list[Row]:
    """A row per question: all that is known of it."""
    rows: list[Row] = []
    for at, (item, read, value) in enumerate(zip(items, scored.read, scored.values, strict=True)):
        row = known.get(item.id, {})
        rows.append(
            {
                "key": item.id,
                "id": item.id,
                "category": item.category,
                "prompt": item.prompt,
                "answer": item.facts["row"].get("answer"),
                "reply": row.get("reply"),
                "read": read,
                "score": None if at in scored.failed else value,
                "correct": value == 1,
                "failure": scored.failed.get(at) or (None if row else "no reply"),
            }
        )
    return rows
