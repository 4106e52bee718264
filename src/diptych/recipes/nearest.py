"""Settings near a recipe's own whose step a card holds: those that change no result first.

A trace of a full-size step takes a minute, so that few are made. What a process holds throughout (weights, gradients,
the optimiser's state, averages) is counted from the sizes of the parts alone: settings whose count does not fit are
never traced, and of sizes that grow one after the other the largest that fits is found by halving.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from diptych.core.errors import UserError
from diptych.recipes.build import build_system
from diptych.recipes.check import check_system
from diptych.recipes.recipe import Part, Recipe, StageSpec
from diptych.systems.base import System
from diptych.training.loop import freeze

PROCESSES = (8, 16, 32, 64)
"""Numbers of processes that are tried where a run may be sharded."""
ROUNDED = 0.1
"""Share of a batch by which it may change so that it divides among them."""
DRAWN = {"sample_every": "0", "score_every": "0", "sample_clip": "null"}
"""Settings of a run that has to be off where no process has the whole model, and the words that turn them off."""
QUANTIZED = ("backbone", "decoder", "network")
"""Parts that may be quantised."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """words: as on the command line. key: changes of one key replace each other. processes: how many it starts."""

    words: tuple[str, ...]
    key: str
    apply: Callable[[Recipe], Recipe]
    processes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """changes: as on the command line ("run.checkpointing=[decoder]", "--processes 8"). needed: bytes of a process
    with them. fits: whether the card holds that; where nothing does, these need least. traced: how many settings were
    traced to find them."""

    changes: tuple[str, ...]
    needed: int
    fits: bool
    traced: int = 0

    def words(self) -> str:
        settings = [change for change in self.changes if not change.startswith("--")]
        others = [change for change in self.changes if change.startswith("--")]
        return " ".join([*others, *(["--set", *settings] if settings else [])])


def nearest(recipe: Recipe, stage: str, room: int, processes: int = 1) -> Nearest | None:
    """Settings of one stage with which a process takes at most `room` bytes; None where no change is possible.

    What a process holds throughout is made to fit first, with as few changes as that takes; then what its passes need.
    Where passes cannot be made small enough, more of the first kind follow.
    """
    search = Search(replace(recipe, stages={stage: recipe.stages[stage]}), stage, room, processes)
    lasting, passing = search.lasting(), search.passing()
    for count in range(len(lasting) + 1):
        smaller = search.together(lasting[:count])
        if search.holds(smaller) > room and count < len(lasting):
            continue
        for change in smaller[:-1]:  # what later ones made needless
            fewer = [other for other in smaller if other is not change]
            smaller = fewer if search.holds(fewer) <= room else smaller
        settings = search.fitted(smaller, passing)
        if settings is not None:
            return search.result(settings, fits=True)
    if search.least is None:
        search.needs(search.together([*lasting, *(options[-1] for options in passing)]))
    return None if search.least is None else search.result(search.least[1], fits=False)


@dataclass
class Search:
    """What was traced so far, for one stage and one card. least: the settings that need least of those traced."""

    recipe: Recipe
    stage: str
    room: int
    processes: int
    traced: dict[tuple[str, ...], int | None] = field(default_factory=dict[tuple[str, ...], int | None])
    least: tuple[int, list[Change]] | None = None

    def __post_init__(self) -> None:
        self.system: System = build_system(self.recipe.system, meta=True)
        freeze(self.system, self.recipe.stages[self.stage].train)
        inside = {id(p) for unit in self.system.shard_units() for p in unit.parameters() if p.ndim == 2}
        learned = [p for p in self.system.parameters() if p.requires_grad]
        self.learned = sum(p.numel() for p in learned)
        self.matrices = sum(p.numel() for p in learned if id(p) in inside)
        self.frozen = sum(p.numel() for p in self.system.parameters()) - self.learned

    # What settings take

    def applied(self, chosen: Sequence[Change]) -> tuple[Recipe, int]:
        """The recipe with these changes, and its processes."""
        recipe, processes = self.recipe, self.processes
        for change in chosen:
            recipe, processes = change.apply(recipe), change.processes or processes
        return recipe, processes

    def holds(self, chosen: Sequence[Change]) -> int:
        """Bytes that a process holds throughout, at least: weights, gradients, the optimiser's state and averages."""
        recipe, processes = self.applied(chosen)
        spec, run = recipe.stages[self.stage], recipe.run
        shards = processes // (run.replicas or 1) if run.sharded else 1
        each = 2.0 if run.frozen_weights == "bfloat16" else 4.0
        each = 0.5 if any(part.quantize != "none" for part in parts_of(recipe)) else each  # of all, at the least
        moments = {"adamw8bit": 2 * self.learned, "muon": 8 * self.learned - 4 * self.matrices}
        learned = 8 * self.learned + moments.get(spec.optimizer.kind, 8 * self.learned)
        learned += 4 * self.learned * (bool(spec.ema_decay) + (processes > 1 and not run.sharded))  # DDP's buckets
        return int((self.frozen * each + learned) / max(1, shards))

    def needs(self, chosen: Sequence[Change]) -> int | None:
        """Bytes of a process at the worst moment of a step; None for settings that do not go together."""
        words = tuple(word for change in chosen for word in change.words)
        if words not in self.traced:
            recipe, processes = self.applied(chosen)
            try:
                size = check_system(recipe, processes=processes).stages[0].memory.total
            except UserError:
                size = None
            self.traced[words] = size
            if size is not None and chosen and (self.least is None or size < self.least[0]):
                self.least = size, list(chosen)
        return self.traced[words]

    def fits(self, chosen: Sequence[Change]) -> bool:
        size = self.needs(chosen)
        return size is not None and size <= self.room

    def fitted(self, base: list[Change], passing: Sequence[Sequence[Change]]) -> list[Change] | None:
        """Changes of `base` and as few of the others as make the step fit; None where they do not."""
        if self.holds(base) > self.room:
            return None
        if base and self.fits(base):
            return base
        chosen = base
        for options in passing:
            if not self.fits([*chosen, options[-1]]):  # the strongest
                chosen = chosen if self.needs([*chosen, options[-1]]) is None else [*chosen, options[-1]]
                continue
            low, high = 0, len(options) - 1  # the weakest that fits
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if self.fits([*chosen, options[middle]]) else (middle + 1, high)
            chosen = [*chosen, options[high]]
            for change in chosen[len(base) : -1]:
                fewer = [other for other in chosen if other is not change]
                chosen = fewer if self.fits(fewer) else chosen
            return chosen
        return None

    def result(self, chosen: list[Change], *, fits: bool) -> Nearest:
        size = self.needs(chosen)
        assert size is not None, "these were traced"
        words = tuple(dict.fromkeys(word for change in chosen for word in change.words))
        return Nearest(changes=words, needed=size, fits=fits, traced=len(self.traced))

    # Changes in the order of their cost

    def passing(self) -> list[list[Change]]:
        """Those that make passes smaller, of each kind the weakest first: activations that are computed again and
        passes of fewer samples give the same result and take time; half precision changes rounding."""
        spec, run = self.recipe.stages[self.stage], self.recipe.run
        kinds: list[list[Change]] = []
        names = blocks_of(self.system)
        if set(names) - set(run.checkpointing):
            again = (f"run.checkpointing=[{','.join(names)}]",)
            kinds.append([Change(words=again, key="checkpointing", apply=on_run(checkpointing=tuple(names)))])
        size, sizes = min(spec.micro_batch_size or spec.batch_size, -(-spec.batch_size // self.processes)), list[int]()
        while size > 1:
            size = -(-size // 2)
            sizes.append(size)
        smaller = [
            Change(
                words=(f"stages.{self.stage}.micro_batch_size={size}",),
                key="micro_batch_size",
                apply=on_stage(self.stage, micro_batch_size=size),
            )
            for size in sizes
        ]
        kinds += [smaller] if smaller else []
        if run.precision == "fp32":
            kinds.append([Change(words=("run.precision=bf16",), key="precision", apply=on_run(precision="bf16"))])
        return kinds

    def lasting(self) -> list[Change]:
        """Those that make what a process holds smaller: bfloat16 of what does not learn, quantised weights under
        adapters, which cost quality, and shards over more processes, which cost cards."""
        spec, run = self.recipe.stages[self.stage], self.recipe.run
        changes: list[Change] = []
        if run.frozen_weights != "bfloat16" and self.frozen:
            words = (*(("run.precision=bf16",) if run.precision == "fp32" else ()), "run.frozen_weights=bfloat16")
            halved = on_run(precision="bf16", frozen_weights="bfloat16")
            changes.append(Change(words=words, key="frozen_weights", apply=halved))
        quantized = any(part.quantize != "none" for part in parts_of(self.recipe))
        if spec.train == ("lora",) and not (run.sharded and self.processes > 1):
            for name in QUANTIZED:
                part = getattr(self.recipe.system, name, None)
                if isinstance(part, Part) and part.quantize == "none":
                    words = (f"system.{name}.quantize=nf4",)
                    changes.append(Change(words=words, key=f"quantize {name}", apply=on_part(name, quantize="nf4")))
        if quantized or spec.data.cache:  # which no shards go with
            return changes
        words = ("run.strategy=fsdp", *(f"run.{name}={no}" for name, no in DRAWN.items() if getattr(run, name)))
        shards = on_run(strategy="fsdp", sample_every=0, score_every=0, sample_clip=None)  # no process could draw
        if not run.sharded and self.processes > 1:
            changes.append(Change(words=words, key="shards", apply=shards))
        for count in PROCESSES:
            batch = divisible(spec.batch_size, count)
            if count <= self.processes or batch is None:
                continue
            sized = (f"stages.{self.stage}.batch_size={batch}",) if batch != spec.batch_size else ()

            def apply(recipe: Recipe, batch: int = batch) -> Recipe:
                return on_stage(self.stage, batch_size=batch)(recipe if recipe.run.sharded else shards(recipe))

            several = (f"--processes {count}", *(() if run.sharded else words), *sized)
            changes.append(Change(words=several, key="shards", apply=apply, processes=count))
        return changes

    def together(self, changes: Sequence[Change]) -> list[Change]:
        """Of each key the last; without quantised weights where the run is sharded."""
        last = {change.key: change for change in changes}
        if "shards" in last:
            last = {key: change for key, change in last.items() if not key.startswith("quantize")}
        return list(last.values())


def divisible(batch: int, processes: int) -> int | None:
    """The batch nearest to this one that divides among the processes; None where that is another batch altogether."""
    below, above = batch // processes * processes, -(-batch // processes) * processes
    near = above if above - batch <= batch - below or not below else below
    return near if abs(near - batch) <= ROUNDED * batch else None


def parts_of(recipe: Recipe) -> list[Part]:
    """The parts of a recipe's system that are described as such."""
    return [part for part in vars(recipe.system).values() if isinstance(part, Part)]


def blocks_of(system: System) -> list[str]:
    """Parts that learn, or that gradients pass, and whose blocks can be recomputed."""
    inside = {id(p) for unit in system.shard_units() for p in unit.parameters()}
    return [
        name
        for name, part in system.named_parts().items()
        if name not in ("lora", "autoencoder") and any(id(p) in inside for p in part.parameters())
    ]


def on_run(**changes: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, run=replace(recipe.run, **changes))


def on_stage(name: str, **changes: Any) -> Callable[[Recipe], Recipe]:
    def apply(recipe: Recipe) -> Recipe:
        spec: StageSpec = replace(recipe.stages[name], **changes)
        return replace(recipe, stages={**recipe.stages, name: spec})

    return apply


def on_part(name: str, **changes: Any) -> Callable[[Recipe], Recipe]:
    def apply(recipe: Recipe) -> Recipe:
        part = dataclasses.replace(getattr(recipe.system, name), **changes)
        system: Any = dataclasses.replace(recipe.system, **{name: part})  # pyright: ignore[reportArgumentType]
        return replace(recipe, system=system)

    return apply
