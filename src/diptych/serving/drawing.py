"""Images of many requests, step by step: each has its own noise, time, condition and solver, and those of one shape and
the same branches of guidance are one batch of the decoder.

Shapes: G pictures of a group, K branches, C latent channels, h and w latent sides.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diptych.core.condition import Condition, TokenCondition
from diptych.core.draws import Draws
from diptych.core.sample import Batch, Sample
from diptych.data.imaging import to_pil
from diptych.inference.engine import ENCODED, Engine
from diptych.inference.guidance import Branch, Guidance
from diptych.inference.requests import cut
from diptych.inference.sampling import Sampling
from diptych.inference.scales import View, views
from diptych.inference.solvers import Solver, Step, Walk

NULLS = 32
"""Conditions of requests without text that a model keeps."""

Partial = Callable[[Image.Image, int], None]
"""Called with an estimate of the final picture, and its number from 0."""


def number_format(engine: Engine) -> AbstractContextManager[Any]:
    """The context in which an engine computes."""
    dtype = engine.computes_in
    return nullcontext() if dtype is None else torch.autocast(engine.system.device.type, dtype)


class Conditions:
    """What a model's requests are conditioned on; those without text and images, which many share, are kept."""

    def __init__(self) -> None:
        self._nulls: OrderedDict[tuple[Any, ...], Condition] = OrderedDict()

    def of(self, engine: Engine, sample: Sample, guidance: Guidance, negative: str) -> dict[Branch, Condition]:
        """The condition of every branch that the guidance of a request needs, in the order in which they run."""
        batch = Batch((sample,)).to(engine.system.device)
        branches = guidance.branches(batch)
        made: dict[Branch, Condition] = {}
        for branch in sorted(branches, key=ENCODED.index):
            version = engine.version(branch, batch, negative)
            key = (sample.task, sample.size, negative, sample.messages, len(sample.context_images))
            if branch == "null" and key in self._nulls:
                made[branch] = self._nulls[key]
                continue
            made[branch] = engine.system.encode(version)
            if branch == "null":
                self._nulls[key] = made[branch]
                if len(self._nulls) > NULLS:
                    self._nulls.popitem(last=False)
        return {branch: made[branch] for branch in branches}


@dataclass
class Pass:
    """One scale of one picture: a solver on its way, and what it asks for now."""

    walk: Walk
    guidance: Guidance
    conditions: Mapping[Branch, Condition]
    x: Tensor = field(init=False)
    t: float = field(init=False)

    def acting(self) -> tuple[Branch, ...]:
        """The branches that run at the present time."""
        branches = tuple(self.conditions)
        return branches if len(branches) > 1 and self.guidance.acts(self.t) else ("full",)


class Picture:
    """One picture from its noise to its pixels, over all its scales.

    Args:
        sample: the request, with its size. key: of the noise. partials: estimates to decode on the way of the last
            scale. tell: gets them.
    """

    def __init__(
        self,
        engine: Engine,
        conditions: Conditions,
        sample: Sample,
        key: int,
        settings: Sampling,
        *,
        scales: str = "last",
        partials: int = 0,
        tell: Partial | None = None,
    ) -> None:
        assert sample.size is not None, "every request has its size here"
        self.engine = engine
        self.pixels: list[Tensor] = []  # (3, H, W) in [-1, 1] at each scale that is made
        self.draws = Draws([key], engine.system.device)
        self.partials, self.tell = partials, tell
        self.sent = 0
        self.steps = 0
        plans = [(view, *engine.plan(view, settings)) for view in views(engine.system, sample.size, scales)]
        shared = conditions.of(engine, sample, plans[0][2], settings.negative)
        self._plans: Iterator[tuple[View, Solver, Guidance]] = iter(plans)
        self._left = len(plans)
        self._shared = shared
        self.tokens = sum(view.shape[1] * view.shape[2] // engine.system.token_side**2 for view, _, _ in plans)
        self.now: Pass | None = None
        self._next_scale()

    @property
    def done(self) -> bool:
        return self.now is None

    def images(self) -> list[Image.Image]:
        """The picture at each scale."""
        return [to_pil(pixels) for pixels in self.pixels]

    def answer(self, velocity: Tensor) -> None:
        """Go one call further with the velocity (1, C, h, w) that was asked for."""
        assert self.now is not None
        try:
            self.now.x, self.now.t = self.now.walk.send(velocity)
        except StopIteration as end:
            self.pixels.append(self.engine.system.to_images(end.value)[0].clamp(-1, 1).float().cpu())
            self._next_scale()

    def close(self) -> None:
        """Drop what is under way."""
        if self.now is not None:
            self.now.walk.close()
        self.now = None

    def _next_scale(self) -> None:
        plan = next(self._plans, None)
        if plan is None:
            self.now = None
            return
        self._left -= 1
        view, solver, guidance = plan
        conditions: dict[Branch, Condition] = {branch: view.of(condition) for branch, condition in self._shared.items()}
        watch = self._watch if self.partials and self.tell is not None and not self._left else None
        noise = self.draws.normal(view.noise, *view.shape)
        self.now = Pass(solver.walk(noise, watch), guidance, conditions)
        self.steps += len(solver.times)
        self.now.x, self.now.t = next(self.now.walk)

    def _watch(self, step: Step) -> None:
        """Decode the estimate after a step that one of the partial pictures falls on."""
        due = round(step.of * (self.sent + 1) / (self.partials + 1))
        if self.sent < self.partials and step.number >= max(due, 1) and self.tell is not None:
            pixels = self.engine.system.to_images(step.data)[0].clamp(-1, 1).float().cpu()
            self.tell(to_pil(pixels), self.sent)
            self.sent += 1


class Joined:
    """Joined conditions of groups, kept while a group stays together, so that a step joins nothing.

    A group is known by which objects its conditions are. These are kept with the entry: an object that was freed would
    leave its identity to that of a later request, which would then be drawn from the condition of another.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], tuple[list[Mapping[Branch, Condition]], Condition]] = {}
        self._used: set[tuple[Any, ...]] = set()

    def of(self, group: Sequence[Pass], branches: tuple[Branch, ...]) -> Condition:
        """The conditions of a group, branch by branch: rows (K G)."""
        key = (*branches, *(id(member.conditions) for member in group))
        if key not in self._kept:
            first, *others = [member.conditions[branch] for branch in branches for member in group]
            joined = first.join(others) if others else first
            self._kept[key] = [member.conditions for member in group], joined
        self._used.add(key)
        return self._kept[key][1]

    def forget(self) -> None:
        """Drop what was not used since the last call."""
        self._kept = {key: entry for key, entry in self._kept.items() if key in self._used}
        self._used = set()


@torch.no_grad()
def advance(engine: Engine, pictures: Sequence[Picture], joined: Joined, capacity: int) -> list[int]:
    """One call of the velocity for each of these pictures, in as few runs of the decoder as their shapes allow.

    Args:
        capacity: pictures of one run.

    Returns:
        rows of each run.
    """
    # Pictures of one shape whose guidance compares the same branches now.
    groups: dict[tuple[Any, ...], list[Picture]] = {}
    for picture in pictures:
        assert picture.now is not None
        groups.setdefault(likeness(picture.now), []).append(picture)
    runs: list[int] = []
    for together in groups.values():
        for group in cut(together, capacity):
            passes = [picture.now for picture in group if picture.now is not None]
            branches = passes[0].acting()
            # All branches of all pictures as one batch, each at its own time.
            x = torch.cat([member.x for member in passes] * len(branches))  # (K G, C, h, w)
            times = torch.tensor([member.t for member in passes] * len(branches), device=x.device)  # (K G,)
            runs.append(len(x))
            with number_format(engine):
                v = engine.system.velocity(x, times, joined.of(passes, branches)).split(1)
                # Each picture combines its own branches and goes on.
                for place, (picture, member) in enumerate(zip(group, passes, strict=True)):
                    mine: dict[Branch, Tensor] = {
                        branch: v[k * len(group) + place] for k, branch in enumerate(branches)
                    }
                    velocity = mine["full"] if len(branches) == 1 else member.guidance.combine(mine, member.t)
                    picture.answer(velocity)
    joined.forget()
    return runs


def likeness(member: Pass) -> tuple[Any, ...]:
    """What two pictures must share to be one batch: shape, branches, and the kind of their conditions."""
    branches = member.acting()
    kinds: list[tuple[Any, ...]] = []
    for branch in branches:
        condition = member.conditions[branch]
        details: tuple[Any, ...] = ()
        if isinstance(condition, TokenCondition):
            latents = condition.context_latents
            details = (condition.pooled is not None, latents is not None, latents is not None and len(latents[0]) > 0)
        kinds.append((type(condition), *details))
    return (tuple(member.x.shape), member.x.dtype, branches, tuple(kinds))


def sized(engine: Engine, sample: Sample, settings: Sampling, given: bool) -> Sample:
    """The request with the size of its image."""
    return replace(sample, size=engine.image_size(sample, settings, given))
