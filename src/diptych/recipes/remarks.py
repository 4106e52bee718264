"""What is allowed in a recipe, and hardly meant."""

from __future__ import annotations

from diptych.recipes.recipe import Recipe


def remarks(recipe: Recipe) -> list[str]:
    """One line for each: a warm-up that takes more than half of a stage, as one that was shortened keeps its base's;
    the `repeats` of a stage's only source."""
    lines: list[str] = []
    for name, stage in recipe.stages.items():
        warmup = stage.schedule.warmup
        if warmup >= stage.steps:
            lines.append(
                f"stages.{name}: the warm-up of {warmup:,} steps is not over after its {stage.steps:,}, so that the "
                f"learning rate never reaches {stage.optimizer.lr:g}; set stages.{name}.schedule.warmup"
            )
        elif 2 * warmup > stage.steps:
            lines.append(
                f"stages.{name}: the warm-up takes {warmup:,} of its {stage.steps:,} steps; set "
                f"stages.{name}.schedule.warmup"
            )
        repeated = [(source, spec.repeats) for source, spec in stage.data.sources.items() if spec.repeats]
        if len(stage.data.sources) == 1 and repeated:
            source, repeats = repeated[0]
            lines.append(
                f"stages.{name}.data.sources.{source}: repeats of {repeats} change nothing, as it is the only source; "
                f"stages.{name}.steps says how often its items are seen"
            )
    return lines
