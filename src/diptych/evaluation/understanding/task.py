"""An understanding benchmark from its files to its entry of results.json, by the harness's rules."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diptych.core.errors import UserError
from diptych.core.files import write_text
from diptych.evaluation import benchmark as harness_benchmark
from diptych.evaluation.benchmark import Tools
from diptych.evaluation.download import STATED, Data, File, check, file_digest
from diptych.evaluation.harness import LISTED, Plan, Share, Told, meet
from diptych.evaluation.journal import Journal
from diptych.evaluation.judge import Judge, JudgeDown, Question, Reply, lasting
from diptych.evaluation.results import Judged, TaskResult
from diptych.evaluation.understanding import asking, judged
from diptych.evaluation.understanding.asking import Asked, Item
from diptych.evaluation.understanding.benchmarks import Benchmark
from diptych.evaluation.understanding.scored import Scored
from diptych.inference.engine import Engine

ATTEMPTS = 3
"""How often a judge is asked the same before an answer that cannot be used is a failure."""
BATCH = 8


def run(
    engine: Engine | None,
    benchmark: Benchmark,
    plan: Plan,
    tools: Tools,
    progress: Told | None = None,
    *,
    batch_size: int = BATCH,
) -> TaskResult | None:
    """Ask and score; None when only replies were asked for, or for the processes beside the first.

    `OUTPUT/TASK/replies.jsonl` holds every reply, `OUTPUT/TASK/scores.jsonl` what each unit of the benchmark earned.

    Raises:
        UserError: a file is missing or not the published one, or there is no reply to score.
        JudgeDown: the judge cannot be asked any more; what it said is remembered.
    """
    begin = time.perf_counter()
    share, place = Share.here(), plan.output / benchmark.name
    judge = tools.require_judge(benchmark.name) if benchmark.score_judged and plan.only != "generate" else None
    folder, files = located(benchmark, tools.data)
    questions = asking.items(benchmark, folder, plan.limit)
    told = None if progress is None else lambda done, total: progress(f"{benchmark.name}: ask", done, total)
    if plan.only == "score":
        journal = known_replies(place, benchmark, files)
        asked = asking.known(questions, journal)
    else:
        assert engine is not None, "questions need a model"
        made_with = {
            "model": engine.name,
            "task": benchmark.name,
            "files": files,
            "max_new_tokens": benchmark.max_new_tokens,
        }
        journal = Journal(place / (f"replies.{share.rank}.jsonl" if share.rank else "replies.jsonl"), made_with)
        if share.count == 1:
            gather(journal, place)
        own = questions[share.rank :: share.count]
        asked = asking.ask(
            engine,
            own,
            max_new_tokens=benchmark.max_new_tokens,
            batch_size=batch_size,
            journal=journal,
            progress=told,
        )
        meet(share)
        if not share.rank and share.count > 1:
            gather(journal, place)
            asked.replies |= asking.known(questions, journal).replies
    if share.rank or plan.only == "generate":
        return None
    for item in questions:
        if item.id not in asked.replies and item.id not in asked.failed:
            asking.read(item, asked)
    if not asked.replies:
        reasons = next(iter(asked.failed.values()), "run it without --only score first")
        raise UserError(f"{benchmark.name}: no reply to any of the {len(questions)} questions; {reasons}")
    panel = None if judge is None else Panel(judge, benchmark.name, progress)
    scored = asking.score(benchmark, questions, asked, panel)
    scores = entry(benchmark, questions, asked, scored, plan.limit)
    judging = {} if judge is None else {f"judge_{name}": value for name, value in judge.about().items()}
    scores["about"] |= {"model": journal.made_with.get("model"), "files": "; ".join(files.values()), **judging}
    scores["seconds"] = round(time.perf_counter() - begin, 2)
    write_units(place / "scores.jsonl", questions, scored)
    return TaskResult(
        task=benchmark.name, scores=scores, samples=samples(questions, asked, scored), failed=len(scored.failed)
    )


def located(benchmark: Benchmark, data: Data) -> tuple[Path, dict[str, str]]:
    """The folder of a benchmark's files, fetched and checked, and what each file is.

    A parquet file of the same name stands for a table; it has no published checksum, so the one seen first is noted.
    """
    folder = data.folder / benchmark.folder
    found: dict[str, str] = {}
    for file in benchmark.files:
        published = File(url=file.url, sha256=None, md5=file.md5, licence=STATED)
        other = (folder / file.name).with_suffix(".parquet")
        if other.is_file() and not (folder / file.name).is_file():
            check(replace(published, md5=None), other)
            found[file.name] = (
                f"{other.name}, SHA-256 {file_digest(other)[:12]}..., not compared with any published sum"
            )
        else:
            data.get(benchmark.folder, published)
            found[file.name] = f"{file.name}, MD5 {file.md5} as published"
    return folder, found


def known_replies(place: Path, benchmark: Benchmark, files: Mapping[str, str]) -> Journal:
    """The replies that an earlier run left."""
    path = place / "replies.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no replies to score; run {benchmark.name} without --only score first")
    journal = Journal(path, None)
    if journal.made_with.get("files") != files:
        raise UserError(f"{place}: the replies are to other files of {benchmark.name}; choose another --output")
    gather(journal, place)
    return journal


def gather(journal: Journal, place: Path) -> None:
    """Take over the replies that other processes left in journals of their own, once they are done."""
    for path in sorted(place.glob("replies.*.jsonl")):
        for key, row in Journal(path, journal.made_with).rows.items():
            if key not in journal.rows:
                journal.add(key, {"prompt": row["prompt"], "reply": row["reply"]})


class Panel:
    """A harness's judge as the scorers of replies ask it: as many at a time as it has workers.

    A reply that cannot be used is asked for again; what is down stops the run.
    """

    def __init__(self, judge: Judge, name: str, progress: Told | None = None) -> None:
        self.judge, self.name, self.progress = judge, name, progress

    def __call__(self, prompts: Sequence[str], usable: judged.Usable) -> list[Reply]:
        found: dict[int, Reply] = {}
        try:
            for at, reply in harness_benchmark.judged(
                self.judge, range(len(prompts)), lambda at: self._one(prompts[at], usable)
            ):
                found[at] = reply
                if self.progress is not None:
                    self.progress(f"{self.name}: judge", len(found), len(prompts))
        except JudgeDown as error:
            raise JudgeDown(
                f"{error}; {len(found)} of {len(prompts)} replies of {self.name} are judged and kept, the same command "
                "goes on from there"
            ) from error
        return [found[at] for at in range(len(prompts))]

    def _one(self, prompt: str, usable: judged.Usable) -> Reply:
        reply = Reply(failure="not asked")
        for attempt in range(ATTEMPTS):
            reply = self.judge.ask(Question(text=prompt, attempt=attempt))
            if reply.failure is None and usable(reply.text):
                return reply
            if not lasting(reply):
                return reply
        return replace(reply, failure=reply.failure or f"cannot be used: {reply.text[:60]!r}")


def entry(
    benchmark: Benchmark, questions: Sequence[Item], asked: Asked, scored: Scored, limit: int | None
) -> dict[str, Any]:
    """A task's entry of results.json: the scores, what they rest on, and whether they can be compared."""
    missing = {
        item.id: asked.failed.get(item.id, "not asked yet") for item in questions if item.id not in asked.replies
    }
    notes: list[str] = []
    if missing:
        notes.append(f"{len(missing)} of {len(questions)} questions have no reply and count as wrong")
    if scored.failed:
        notes.append(f"{len(scored.failed)} replies could not be judged and are left out of the means")
    if limit is not None:
        notes.append(f"--limit {limit}: not comparable with full runs")
    span = scored.interval()
    fixed: dict[str, Any] = {
        "overall": scored.overall,
        "interval": None if span is None else list(span),
        "figures": scored.figures,
        "questions": len(questions),
        "unread": scored.unread - len(missing) - len(scored.failed),
        "missing": len(missing),
        "failed": len(scored.failed),
        "incomplete": bool(missing or scored.failed),
        "comparable": not (missing or scored.failed or limit is not None),
        "notes": notes,
        "missing_files": [f"{name} ({reason})" for name, reason in list(missing.items())[:LISTED]],
        "failures": [
            {"image": questions[at].id, "failure": reason} for at, reason in list(scored.failed.items())[:LISTED]
        ],
        "about": {
            "convention": scored.convention,
            "unit": scored.unit,
            "max_new_tokens": benchmark.max_new_tokens,
            **pairing(scored),
        },
    }
    return {(f"category {name}" if name in fixed else name): each for name, each in scored.categories().items()} | fixed


def pairing(scored: Scored) -> dict[str, Any]:
    """How `diptych compare` makes an overall figure of what single units earned."""
    if scored.total is None:
        return {"overall_is": "items", "compared_is": "the share of right replies, not the headline figure"}
    whole = scored.total if isinstance(scored.total, str) else dict(scored.total)
    return {"overall_is": whole, **({"scale": scored.scale} if scored.scale != 1 else {})}


def write_units(path: Path, questions: Sequence[Item], scored: Scored) -> None:
    """scores.jsonl: a row for each unit (a question, or those that only count together)."""
    lines = [
        json.dumps(
            {
                "id": questions[unit[0]].id,
                "category": category,
                "score": worth,
                "questions": [questions[at].id for at in unit],
            },
            ensure_ascii=False,
        )
        for unit, category, worth in scored.earned([item.row for item in questions])
    ]
    write_text(path, "".join(line + "\n" for line in lines))


def samples(questions: Sequence[Item], asked: Asked, scored: Scored) -> list[Judged]:
    """A row per question: all that is known of it."""
    return [
        Judged(
            row={
                "id": item.id,
                "category": str(item.row.get("category", "all")),
                "prompt": item.prompt,
                "answer": item.row.get("answer"),
                "reply": asked.replies.get(item.id),
                "read": read,
                "score": None if at in scored.failed else value,
                "failure": scored.failed.get(at) or asked.failed.get(item.id),
            },
            correct=value == 1,
        )
        for at, (item, read, value) in enumerate(zip(questions, scored.read, scored.values, strict=True))
    ]
