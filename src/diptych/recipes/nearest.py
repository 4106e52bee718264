"""Settings near a recipe's own whose step a card holds: those that change no result first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from diptych.core.errors import UserError
from diptych.recipes.build import build_system
from diptych.recipes.check import check_system
from diptych.recipes.recipe import Part, Recipe, StageSpec

PROCESSES = (8, 16, 32, 64)
"""Numbers of processes that are tried where a run may be sharded."""

Change = tuple[str, Callable[[Recipe], Recipe]]
"""What one would write on the command line, and what it does."""


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """changes: as on the command line ("run.checkpointing=[decoder]", "--processes 8"). needed: bytes of a process
    with them. fits: whether the card holds that; where nothing does, these need least."""

    changes: tuple[str, ...]
    needed: int
    fits: bool

    def words(self) -> str:
        settings = [change for change in self.changes if not change.startswith("--")]
        others = [change for change in self.changes if change.startswith("--")]
        return " ".join([*others, *(["--set", *settings] if settings else [])])


def nearest(recipe: Recipe, stage: str, room: int, processes: int = 1) -> Nearest | None:
    """Settings of one stage with which a process takes at most `room` bytes; None where no change is possible.

    Changes are added in the order of their cost until the step fits; those before the last that are not needed are
    dropped again.
    """
    alone = replace(recipe, stages={stage: recipe.stages[stage]})
    changes = candidates(alone, stage, processes)

    def needed(chosen: list[Change]) -> int | None:
        changed, count = alone, processes
        try:
            for name, apply in chosen:
                changed = apply(changed)
                count = int(name.split()[1]) if name.startswith("--processes") else count
            return check_system(changed, processes=count).stages[0].memory.total
        except UserError:  # settings that do not go together
            return None

    chosen: list[Change] = []
    best: tuple[int, list[Change]] | None = None
    # Add changes while they help; one of the same setting takes the place of the former.
    for change in changes:
        key = change[0].split("=")[0].split()[0]
        tried = [*(known for known in chosen if known[0].split("=")[0].split()[0] != key), change]
        size = needed(tried)
        if size is None or (best is not None and size >= best[0]):
            continue
        chosen, best = tried, (size, tried)
        if size <= room:
            break
    if best is None:
        return None
    # Drop those without which the step fits as well.
    size = best[0]
    for change in list(chosen[:-1]) if size <= room else ():
        fewer = [known for known in chosen if known is not change]
        without = needed(fewer)
        if without is not None and without <= room:
            chosen, size = fewer, without
    return Nearest(changes=tuple(name for name, _ in chosen), needed=size, fits=size <= room)


def candidates(recipe: Recipe, stage: str, processes: int) -> list[Change]:
    """Changes in the order of their cost: smaller passes and recomputed activations give the same result and take
    time; half precision changes rounding; more processes cost cards; quantised frozen weights cost quality."""
    spec, run = recipe.stages[stage], recipe.run
    changes: list[Change] = []
    # 1. Activations are computed again.
    names = blocks_of(recipe)
    if set(names) - set(run.checkpointing):
        changes.append((f"run.checkpointing=[{','.join(names)}]", on_run(checkpointing=tuple(names))))
    # 2. Passes of fewer samples.
    size = min(spec.micro_batch_size or spec.batch_size, -(-spec.batch_size // processes))
    while size > 1:
        size = -(-size // 2)
        changes.append((f"stages.{stage}.micro_batch_size={size}", on_stage(stage, micro_batch_size=size)))
    # 3. bfloat16, of what does not learn too.
    if run.precision == "fp32":
        changes.append(("run.precision=bf16", on_run(precision="bf16")))
    if run.frozen_weights != "bfloat16":
        changes.append(("run.frozen_weights=bfloat16", on_run(frozen_weights="bfloat16")))
    # 4. Quantised weights under adapters.
    if spec.train == ("lora",) and not (run.sharded and processes > 1):
        for name in ("backbone", "decoder", "network"):
            part = getattr(recipe.system, name, None)
            if isinstance(part, Part) and part.quantize == "none":
                changes.append((f"system.{name}.quantize=nf4", on_part(name, quantize="nf4")))
    # 5. Shards, and more of them.
    quantized = any(isinstance(x, Part) and x.quantize != "none" for x in vars(recipe.system).values())
    if not quantized and not spec.data.cache:
        if not run.sharded:
            changes.append(("run.strategy=fsdp", on_run(strategy="fsdp", sample_every=0, score_every=0)))
        for count in PROCESSES:
            if count > processes and spec.batch_size % count == 0:
                changes.append((f"--processes {count}", lambda recipe: recipe))
    return changes


def blocks_of(recipe: Recipe) -> list[str]:
    """Parts that learn, or that gradients pass, and whose blocks can be recomputed."""
    system = build_system(recipe.system, meta=True)
    inside = {id(p) for unit in system.shard_units() for p in unit.parameters()}
    parts = system.named_parts()
    return [
        name
        for name, part in parts.items()
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
