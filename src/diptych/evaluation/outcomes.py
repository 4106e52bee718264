"""What every item of a task earned, packed into a few letters: a committed file then holds all that intervals need.

Right and wrong become one bit for each output (144 prompts with four images each are 96 letters), a grade between 0
and 1 sixteen bits. What the items are is said once, in a `Layout`: how many each category has, and a digest of their
names, by which two models are known to have been asked the same ones.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.core.errors import UserError
from diptych.evaluation.compare import Scores
from diptych.evaluation.intervals import Weights, shares

LEVELS = 65_535


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The items of a task as one model was asked them.

    categories: how many items each has, in order. outputs: of each item, such as images of a prompt. overall_is: how
    categories make the overall score, as in results.json. digest: of the items' names.
    """

    categories: Mapping[str, int]
    outputs: int
    overall_is: Weights
    digest: str

    @property
    def weights(self) -> dict[str, float]:
        """Each category's weight in the overall score."""
        return shares(self.overall_is, self.categories)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it; `digest` is the key that it stands under."""
        return {"categories": dict(self.categories), "outputs": self.outputs, "overall_is": self.overall_is}

    @staticmethod
    def read(digest: str, plain: Mapping[str, Any]) -> Layout:
        return Layout(
            categories=plain["categories"], outputs=plain["outputs"], overall_is=plain["overall_is"], digest=digest
        )


def pack(scores: Scores, overall_is: Weights, name: str) -> tuple[Layout, str]:
    """The items of a task, and what they earned.

    Args:
        scores: by (category, item), as `compare.read_scores` reads them. name: of the task, for messages.

    Raises:
        UserError: items with different numbers of outputs, or scores that are no grades between 0 and 1.
    """
    by_category: dict[str, list[tuple[str, list[float]]]] = {}
    for (category, item), values in scores.items():
        by_category.setdefault(category, []).append((item, values))
    rows = [values for items in by_category.values() for _, values in items]
    outputs = len(rows[0])
    if any(len(row) != outputs for row in rows):
        raise UserError(f"{name}: its items have different numbers of outputs, so that they cannot be packed")
    table = np.array(rows)
    if table.min() < 0 or table.max() > 1:
        raise UserError(f"{name}: its scores are no grades between 0 and 1, so that they cannot be packed")
    names = [(category, item) for category, items in by_category.items() for item, _ in items]
    layout = Layout(
        categories={category: len(items) for category, items in by_category.items()},
        outputs=outputs,
        overall_is=overall_is,
        digest=hashlib.sha256(repr((names, outputs)).encode()).hexdigest()[:12],
    )
    flat = table.ravel()
    if np.isin(flat, (0, 1)).all():
        return layout, "bits:" + base64.b64encode(np.packbits(flat.astype(bool)).tobytes()).decode()
    levels = np.rint(flat * LEVELS).astype("<u2")
    return layout, "levels:" + base64.b64encode(levels.tobytes()).decode()


def unpack(packed: str, layout: Layout) -> NDArray[np.float64]:
    """Each item's mean over its outputs, (items,).

    Raises:
        UserError: these are not the outcomes of so many items.
    """
    count = sum(layout.categories.values()) * layout.outputs
    form, _, letters = packed.partition(":")
    try:
        data = base64.b64decode(letters, validate=True)
    except ValueError as error:
        raise UserError(f"outcomes {packed[:20]!r}... are not packed ones") from error
    sizes = {"bits": (count + 7) // 8, "levels": 2 * count}
    if len(data) != sizes.get(form):
        raise UserError(f"outcomes {packed[:20]!r}... are not those of {count} outputs")
    if form == "bits":
        flat = np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(np.float64)
    else:
        flat = np.frombuffer(data, "<u2").astype(np.float64) / LEVELS
    return flat.reshape(-1, layout.outputs).mean(1)


def overall(items: NDArray[np.float64], layout: Layout) -> float:
    """The overall score of items' means."""
    weights = layout.weights
    return float(sum(weights[name] * items[part].mean() for name, part in parts(layout).items()))


def parts(layout: Layout) -> dict[str, slice]:
    """Where each category's items stand."""
    ends: Sequence[int] = np.cumsum(list(layout.categories.values())).tolist()
    return {name: slice(end - layout.categories[name], end) for name, end in zip(layout.categories, ends, strict=True)}
