"""GenEval: 553 prompts, four pictures each, judged by a detector and CLIP (Ghosh et al. 2023)."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from diptych.core.files import write_text
from diptych.data.imaging import UNREADABLE
from diptych.evaluation import geneval
from diptych.evaluation.clip import Clip
from diptych.evaluation.geneval_models import CLASSES, ColorNamer, Detection, Detector, cut_out, self_test
from diptych.evaluation.judging import failed
from diptych.evaluation.task import Item, Output, PictureTask, Row, Summary

T = TypeVar("T")
U = TypeVar("U")


class GenEval(PictureTask):
    """Layout as officially: 00000/metadata.jsonl and 00000/samples/0000.png."""

    name: str = "geneval"
    images: int = 4
    rules = geneval.Rules()

    def items(self) -> list[Item]:
        path = self.tools.data.file("geneval", "evaluation_metadata.jsonl")
        items: list[Item] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            metadata = json.loads(line)
            files = tuple(f"{number:05d}/samples/{k:04d}.png" for k in range(self.images))
            facts = {"metadata": metadata, "line": line}
            items.append(
                Item(
                    id=f"{number:05d}",
                    prompt=metadata["prompt"],
                    category=metadata["tag"],
                    files=files,
                    position=number,
                    facts=facts,
                )
            )
        return items

    def about(self) -> dict[str, Any]:
        return {
            "convention": "GenEval: mean of the tags' image accuracies",
            "detector": f"hf-m2f ({self.tools.detector})",
            "colors": self.tools.clip,
            "threshold": self.rules.threshold,
            "counting_threshold": self.rules.counting_threshold,
            "self_test": self.tools.self_test,
        }

    def lay_out(self, folder: Path, item: Item) -> None:
        write_text(folder / item.id / "metadata.jsonl", item.facts["line"])

    def rows(self, outputs: Sequence[Output]) -> Iterator[tuple[Output, Row]]:
        allow = self.tools.data.allow_unpinned
        detector = Detector(self.tools.detector, self.tools.device, allow_unpinned=allow)
        if self.tools.self_test:
            self_test(detector)
        colors = ColorNamer(Clip(self.tools.clip, self.tools.device, allow_unpinned=allow))
        yield from self.look(outputs, detector, colors)

    def look(self, outputs: Sequence[Output], detector: Detector, colors: ColorNamer) -> Iterator[tuple[Output, Row]]:
        """Verdicts batch by batch; the next pictures are read while the model works."""
        for group in batches(ahead(outputs, read), self.tools.batch_size):
            broken = [(output, picture) for output, picture in group if isinstance(picture, str)]
            yield from ((output, failed(reason)) for output, reason in broken)
            whole = [(output, picture) for output, picture in group if not isinstance(picture, str)]
            if not whole:
                continue
            detections = detector.detect([picture for _, picture in whole], self.rules.threshold)
            yield from self.judge(whole, detections, colors)

    def judge(
        self, group: Sequence[tuple[Output, np.ndarray]], objects_by_row: Sequence[list[Detection]], colors: ColorNamer
    ) -> Iterator[tuple[Output, Row]]:
        """Verdicts of a batch; all objects whose colour matters are named at once."""
        crops: list[Image.Image] = []
        names: list[str] = []
        owners: list[tuple[int, str, int]] = []
        seen: list[dict[str, list[Detection]]] = []
        for row, ((output, picture), objects) in enumerate(zip(group, objects_by_row, strict=True)):
            metadata = output.item.facts["metadata"]
            by_class: dict[str, list[Detection]] = {}
            for each in objects:
                by_class.setdefault(CLASSES[each.label], []).append(each)
            seen.append(by_class)
            counting = metadata["tag"] == "counting"
            threshold = self.rules.counting_threshold if counting else self.rules.threshold
            for clause in metadata.get("include", ()):
                if "color" in clause and clause["class"] in by_class:
                    plain = plainly(by_class[clause["class"]])
                    for position in geneval.keep(plain, threshold, self.rules)[: clause["count"]]:
                        if (row, clause["class"], position) not in owners:
                            crops.append(cut_out(picture, by_class[clause["class"]][position]))
                            names.append(clause["class"])
                            owners.append((row, clause["class"], position))
        named = dict(zip(owners, colors.name(crops, names), strict=True))
        for row, (output, _) in enumerate(group):
            detections = {
                name: plainly(each, [named.get((row, name, position), "") for position in range(len(each))])
                for name, each in seen[row].items()
            }
            verdict = geneval.judge(output.item.facts["metadata"], detections, self.rules)
            kept = {
                name: [[*each.boxes[position], round(each.scores[position], 4)] for position in verdict.kept[name]]
                for name, each in detections.items()
                if name in verdict.kept
            }
            detail = {"reasons": verdict.reasons, "text": verdict.text, "boxes": kept}
            yield output, {"score": float(verdict.correct), "correct": verdict.correct, "detail": detail}

    def summary(self, rows: Sequence[Row], items: Sequence[Item]) -> Summary:
        summary = super().summary(rows, items)
        scored = [row for row in rows if row["score"] is not None]
        if not scored:
            return summary
        official = geneval.summary(
            [{"tag": row["category"], "correct": row["correct"], "metadata": row["id"]} for row in scored]
        )
        beside = {name: official[name] for name in ("correct_images", "correct_prompts")}
        return replace(summary, scores={**summary.scores, **beside})


def plainly(objects: Sequence[Detection], colors: Sequence[str] | None = None) -> geneval.Found:
    """Detections of a class as the rules take them."""
    return geneval.Found(boxes=[each.box for each in objects], scores=[each.score for each in objects], colors=colors)


def read(output: Output) -> np.ndarray | str:
    """A picture (H, W, 3) uint8, or why it cannot be read."""
    try:
        with Image.open(output.file) as image:
            return np.asarray(image.convert("RGB"))
    except UNREADABLE as error:
        return f"not a readable picture ({type(error).__name__})"


def ahead(things: Sequence[T], work: Any, workers: int = 4, depth: int = 64) -> Iterator[tuple[T, Any]]:
    """`work` of each, in order, done by threads up to `depth` ahead of what is taken."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(work, thing) for thing in things[:depth])
        for number, thing in enumerate(things):
            if number + depth < len(things):
                waiting.append(pool.submit(work, things[number + depth]))
            yield thing, waiting.popleft().result()


def batches(pairs: Iterable[tuple[T, Any]], size: int) -> Iterator[list[tuple[T, Any]]]:
    """Neighbours of one size of picture, at most `size` together; what is no picture goes along."""
    group: list[tuple[T, Any]] = []
    shape: tuple[int, ...] | None = None
    for thing, picture in pairs:
        current = None if isinstance(picture, str) else tuple(picture.shape)
        if group and (len(group) == size or (current is not None and shape is not None and current != shape)):
            yield group
            group, shape = [], None
        shape = current if current is not None else shape
        group.append((thing, picture))
    if group:
        yield group
