"""Benchmarks of editing that a judge looks at: ImgEdit-Bench and GEdit-Bench-EN."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from diptych.core.errors import UserError
from diptych.core.filenames import member_path
from diptych.data.imaging import UNREADABLE
from diptych.evaluation import gedit, imgedit
from diptych.evaluation.archives import below, unpack
from diptych.evaluation.download import fetch_dataset
from diptych.evaluation.intervals import Bounds
from diptych.evaluation.judge import Judge, Question, Reply, lasting
from diptych.evaluation.judging import failed, fill, judge_about, judged, picture_bytes, prompt_label, wording
from diptych.evaluation.task import Item, Output, PictureTask, Row, Summary, Tools, numbered


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


class ImgEdit(PictureTask):
    """ImgEdit-Bench, basic suite: nine types, three scores from 1 to 5 from the judge; `{key}.png`.

    `overall` is the mean of the nine types (most papers); `overall_per_item` the mean over items (GPT-4o's and
    Ovis-U1's rows). The judge's questions are the published ones.
    """

    name: str = "imgedit"
    bounds: ClassVar[Bounds] = (1.0, 5.0)

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self.entries: dict[str, dict[str, str]] = self._json("basic_edit.json")
        self.questions: dict[str, str] = self._json("prompts.json")

    def _json(self, name: str) -> Any:
        path = self.tools.data.file(self.name, name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not JSON") from error

    def items(self) -> list[Item]:
        items: list[Item] = []
        for key, entry in self.entries.items():
            kind = entry["edit_type"]
            if kind not in self.questions:
                raise UserError(f"imgedit: no judge prompt for edits of type {kind!r}")
            opener = self._opener(entry["id"])
            files = (f"{key}.png",)
            items.append(Item(id=key, prompt=entry["prompt"], category=kind, files=files, sources=opener))
        return numbered(items)

    def _opener(self, name: str) -> Callable[[], list[Image.Image]]:
        path = member_path(name, "basic_edit.json")
        return lambda: [open_source(self.sources() / path)]

    def sources(self) -> Path:
        """The folder of the pictures to edit, unpacked from the published archive once."""
        folder = self.tools.data.folder / self.name / "singleturn"
        if not folder.is_dir():
            unpack(self.tools.data.file(self.name, "Benchmark.tar"), folder, below("singleturn"))
        return folder

    def about(self) -> dict[str, Any]:
        judge = self.tools.require_judge(self.name)
        return {
            "convention": "ImgEdit-Bench: mean of the nine types; replies without three scores from 1 to 5 fail",
            "judge_prompt": "published",
            **judge_about(judge),
        }

    def rows(self, outputs: Sequence[Output]) -> Iterator[tuple[Output, Row]]:
        judge = self.tools.require_judge(self.name)
        yield from judged(judge, outputs, lambda output: self.look(judge, output))

    def look(self, judge: Judge, output: Output) -> Row:
        """Source and result with the type's question."""
        try:
            result = picture_bytes(output.file)
        except UserError as error:
            return failed(str(error))
        assert output.item.sources is not None, "every edit has a source"
        (source,) = output.item.sources()
        text = self.questions[output.item.category].replace("<edit_prompt>", output.item.prompt)
        reply = judge.ask(Question(text=text, images=(png(source), result)))
        problem = reply.failure or imgedit.problem(reply.text)
        if problem is not None:
            return failed(problem, [reply], reply=reply.text)
        each = imgedit.scores(reply.text)
        return {"score": sum(each) / len(each), "detail": {"scores": each, "reply": reply.text}}

    def summary(self, rows: Sequence[Row], items: Sequence[Item]) -> Summary:
        summary = super().summary(rows, items)
        replies = {row["key"]: {"edit_type": row["category"], "reply": row["detail"].get("reply", "")} for row in rows}
        try:
            official = imgedit.summary(replies)
        except ValueError:
            official = {}
        values = [row["score"] for row in rows if row["score"] is not None]
        per_item = sum(values) / len(values) if values else None
        beside = {
            "overall_per_item": per_item,
            "official_per_type": official.get("overall_per_type", {}).get("of_reported_types"),
            "official_per_item": official.get("overall_per_item", {}).get("reported"),
        }
        return replace(summary, scores={**summary.scores, **beside})


class GEdit(PictureTask):
    """GEdit-Bench-EN: 606 edits of eleven kinds; `fullset/{task}/en/{key}.png`.

    `overall` is G_O, the mean of the eleven groups' mean sqrt(SC PQ); SC, PQ and the intersection set stand beside it.
    """

    name: str = "gedit"
    bounds: ClassVar[Bounds] = (0.0, 10.0)

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self.table = list(self._rows())

    def _rows(self) -> Iterator[dict[str, Any]]:
        import pyarrow.parquet as parquet

        folder = self.tools.data.folder / self.name
        if not list(folder.rglob("*.parquet")):
            if not self.tools.data.online:
                raise UserError(f"--data-dir: no *.parquet in {folder}; they are published as stepfun-ai/GEdit-Bench")
            fetch_dataset("stepfun-ai/GEdit-Bench", folder, allow_unpinned=self.tools.data.allow_unpinned)
        columns = ["task_type", "key", "instruction", "instruction_language", "Intersection_exist"]
        for path in sorted(folder.rglob("*.parquet")):
            table = parquet.read_table(path, columns=columns)
            for number, row in enumerate(table.to_pylist()):
                if row["instruction_language"] == "en":
                    yield {**row, "file": path, "row": number}

    def items(self) -> list[Item]:
        items = [
            Item(
                id=str(row["key"]),
                prompt=row["instruction"],
                category=row["task_type"],
                files=(f"fullset/{row['task_type']}/en/{row['key']}.png",),
                sources=self._opener(row),
                facts={"intersection": bool(row["Intersection_exist"])},
            )
            for row in self.table
        ]
        return numbered(items)

    def _opener(self, row: Mapping[str, Any]) -> Callable[[], list[Image.Image]]:
        def opened() -> list[Image.Image]:
            import pyarrow.dataset as dataset

            table = dataset.dataset(row["file"]).take([row["row"]], columns=["input_image"])
            value = table.to_pylist()[0]["input_image"]
            data = value["bytes"] if isinstance(value, dict) else value
            try:
                return [Image.open(io.BytesIO(data)).convert("RGB")]
            except UNREADABLE as error:
                raise UserError(f"{row['file']}: the picture of row {row['row']} cannot be read") from error

        return opened

    def about(self) -> dict[str, Any]:
        judge = self.tools.require_judge(self.name)
        return {
            "convention": "GEdit-Bench-EN, VIEScore: mean of eleven groups; no made-up scores",
            "judge_prompt": prompt_label(self.tools, "gedit_sc", "gedit_pq"),
            **judge_about(judge),
        }

    def rows(self, outputs: Sequence[Output]) -> Iterator[tuple[Output, Row]]:
        judge = self.tools.require_judge(self.name)
        yield from judged(judge, outputs, lambda output: self.look(judge, output))

    def look(self, judge: Judge, output: Output) -> Row:
        """Both questions; both once more if either reply cannot be used."""
        try:
            result = picture_bytes(output.file)
        except UserError as error:
            return failed(str(error))
        assert output.item.sources is not None, "every edit has a source"
        (source,) = output.item.sources()
        before = png(source)
        sc = fill(wording(self.tools, "gedit_sc"), instruction=output.item.prompt)
        pq = fill(wording(self.tools, "gedit_pq"), instruction=output.item.prompt)
        replies: list[Reply] = []
        problem = ""
        for attempt in range(gedit.ATTEMPTS):
            both = [
                judge.ask(Question(text=sc, images=(before, result), attempt=attempt)),
                judge.ask(Question(text=pq, images=(result,), attempt=attempt)),
            ]
            replies += both
            parsed = [gedit.parse(reply.text) for reply in both]
            problems = [reply.failure or gedit.problem(each) for reply, each in zip(both, parsed, strict=True)]
            if problems == [None, None]:
                lowest = {"SC": float(min(parsed[0].score)), "PQ": float(min(parsed[1].score))}
                scores = {**lowest, "O": (lowest["SC"] * lowest["PQ"]) ** 0.5}
                texts = [reply.text for reply in both]
                detail = {**scores, "intersection": output.item.facts["intersection"], "replies": texts}
                return {"score": scores["O"], "detail": detail}
            problem = "; ".join(
                f"{name}: {each}" for name, each in zip(("consistency", "quality"), problems, strict=True) if each
            )
            if not all(lasting(reply) for reply in both):
                break
        return failed(problem, replies, said=[reply.text for reply in replies])

    def summary(self, rows: Sequence[Row], items: Sequence[Item]) -> Summary:
        summary = super().summary(rows, items)
        plain = [
            {"group": row["category"], "language": "en", "intersection_exist": row["detail"]["intersection"]}
            | {name: row["detail"][name] for name in ("SC", "PQ", "O")}
            for row in rows
            if row["score"] is not None
        ]
        official = gedit.summary(plain)
        figures = {
            f"{part}_{name}": official[part][name]["overall"]
            for part in ("full", "intersection")
            for name in ("SC", "PQ", "O")
        }
        return replace(summary, scores={**summary.scores, **figures})


def open_source(path: Path) -> Image.Image:
    """A picture to edit; UserError names one that is missing or broken."""
    try:
        return Image.open(path).convert("RGB")
    except UNREADABLE as error:
        raise UserError(f"{path}: the picture to edit cannot be read; the benchmark's archive is incomplete") from error
