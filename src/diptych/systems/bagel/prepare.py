"""What a loader's workers do for BAGEL: token ids, resized images and patches, with the drops drawn; no weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.prepared import Prepared, Preparer
from diptych.core.sample import Sample, Task
from diptych.systems.bagel.config import BagelConfig
from diptych.systems.bagel.examples import Example, Reader


@dataclass(frozen=True)
class BagelPreparer(Preparer):
    """Samples as `Example`s. A sample's value counts in a mean as `BagelConfig.mean` says: as one, by its tokens, or by
    the roots of its texts' lengths."""

    reader: Reader
    settings: BagelConfig
    tasks: tuple[Task, ...]

    def prepare(self, sample: Sample, draws: Draws) -> Prepared:
        if sample.task not in self.tasks:
            raise UserError(f"{sample.id}: task {sample.task!r} is none of BAGEL's; it has {', '.join(self.tasks)}")
        example = self.reader.example(sample, self.settings, draws)
        if sample.task == "understand":
            targets = [item.targets for item in example.items if item.targets]
            family, count = "cross_entropy", float(sum(targets))
            weight = sum(map(math.sqrt, targets)) if self.settings.mean == "root" else count
        else:
            noised = [item for item in example.items if item.noised]
            family, count = "flow", float(sum(item.cost - 2 for item in noised))
            if example.weights is not None:
                count *= float(example.weights.mean())
            weight = count
        weight = 1.0 if self.settings.mean == "sample" else weight
        return Prepared(
            id=sample.id, task=sample.task, inputs=example, counts={family: count}, weights={family: weight}
        )

    def join(self, rows: Sequence[Prepared]) -> list[Example]:
        return [row.inputs for row in rows]
