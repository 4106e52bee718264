"""A source whose samples bring what `diptych prepare` made of them: latents, vision features, states, scores, sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from diptych.core.errors import UserError
from diptych.core.sample import Sample, Task
from diptych.data.prepared_files import Entry, PreparedSet
from diptych.data.prepared_states import ItemStates
from diptych.data.rows import DIGEST, request_content
from diptych.data.source import BadItem, ItemDraws, Listed, Scored, Size, Source


class PreparedSource(Source, Scored, Listed):
    """A source with prepared sets by their kinds.

    A source of pairs may serve as one of `image`: its samples then lose their captions, which scores were made with.

    `latents` and `features` are compared with the digest of the item's image files each time, `states` with that of
    its texts too, so `source` must give it (`Reading.digests`). `sizes` stand for reading headers; any other kind is a
    score.

    Raises:
        UserError: (on load) an item's image files, or its texts, are not those that these were made of.
    """

    def __init__(self, source: Source, sets: Mapping[str, PreparedSet], task: Task | None = None) -> None:
        self.source, self.sets = source, dict(sets)
        self.name, self.task, self.dropped = source.name, task or source.task, source.dropped

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int, draws: ItemDraws, size: Size) -> Sample:
        sample = self.source.load(index, draws, size)
        if sample.task != self.task:
            sample = replace(sample, task=self.task, text="")
        if (latents := self.sets.get("latents")) is not None:
            [latent] = self._checked(latents, index, sample).tensors
            sample = replace(sample, latent=latent.float())
        if (features := self.sets.get("features")) is not None:
            tokens = self._checked(features, index, sample).tensors
            sample = replace(sample, features=tuple(each.float() for each in tokens))
        if (states := self.sets.get("states")) is not None:
            self._check(states, states.entry(index, 1), request_content(sample), sample)
            sample = replace(sample, states=ItemStates(states, index, sample.id))
        return sample

    def _checked(self, made: PreparedSet, index: int, sample: Sample) -> Entry:
        entry = made.entry(index)
        self._check(made, entry, sample.extra[DIGEST], sample)
        return entry

    def _check(self, made: PreparedSet, entry: Entry, content: int, sample: Sample) -> None:
        kind = made.manifest.kind
        if entry.bad:
            raise BadItem(sample.id, entry.bad)
        if entry.digest != content:
            what = "its images or captions have" if kind == "states" else "its images have"
            raise UserError(
                f"{sample.id}: {what} changed since {kind} of them were made in {made.folder}; run diptych "
                "prepare again, which makes those that changed"
            )
        if not entry.tensors and (kind != "features" or sample.context_images or sample.task == "image"):
            raise UserError(f"{sample.id}: no {kind} in {made.folder}; run diptych prepare again")

    def sizes(self) -> Sequence[Size | None] | np.ndarray | None:
        made = self.sets.get("sizes")
        return self.source.sizes() if made is None else np.nan_to_num(made.numbers).astype(np.int64)

    def numbers(self, name: str) -> np.ndarray | None:
        made = None if name in ("latents", "features", "states", "sizes") else self.sets.get(name)
        return None if made is None else made.numbers

    def column(self, index: int, name: str) -> object:
        numbers = self.numbers(name)
        if numbers is not None:
            return None if np.isnan(numbers[index]) else float(numbers[index])
        return self.source.column(index, name) if isinstance(self.source, Scored) else None

    def identity(self) -> str | None:
        return self.source.identity() if isinstance(self.source, Listed) else None

    def fingerprint(self, index: int) -> str:
        return self.source.fingerprint(index)

    def describe(self) -> str:
        made = ", ".join(f"{kind} from {made.folder}" for kind, made in self.sets.items())
        return f"{self.source.describe()}; {made}"
