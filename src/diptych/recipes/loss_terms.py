"""Which loss terms a stage has, so that a weight for any other is a mistake."""

from __future__ import annotations

from diptych.core.errors import UserError, unknown
from diptych.recipes.distilling import TERM
from diptych.recipes.recipe import StageSpec
from diptych.systems.base import System
from diptych.training.step import weight

ANSWERS = "cross_entropy"


def loss_terms(system: System, spec: StageSpec) -> set[str]:
    """Names that a loss weight of the stage may have: terms ("flow.image") and families of them ("flow_4x4")."""
    tasks = {source.task for source in spec.data.sources.values()}
    families: set[str] = set()
    if spec.kind == "distill":
        families |= {TERM, *(f"{TERM}_{name}" for name in system.scales)}
    elif tasks - {"understand"}:
        families.add("flow")
        families |= {f"flow_{name}" for name in system.scales}
        if getattr(system, "projector", None) is not None:
            families |= {"align", *(f"align_{name}" for name in system.scales)}
    terms = {f"{family}.{task}" for family in families for task in tasks - {"understand"}}
    if "understand" in tasks:
        families.add(ANSWERS)
        terms.add(f"{ANSWERS}.understand")
    return families | terms


def aligns(system: System, spec: StageSpec) -> bool:
    """Whether an alignment's term counts in a stage."""
    terms = [term for term in loss_terms(system, spec) if term.startswith("align") and "." in term]
    return any(weight(spec.loss_weights, term) != 0 for term in terms)


def check_loss_weights(name: str, spec: StageSpec, system: System) -> None:
    """UserError for a weight of a term that the stage does not have, or where all weights are 0."""
    known = loss_terms(system, spec)
    for term in spec.loss_weights:
        if term not in known:
            raise unknown("loss term", term, known, f"stages.{name}.loss_weights")
    whole = ("flow", "align", TERM) if system.scales else ()  # of several scales, each has terms of its own
    terms = {term for term in known if "." in term and term.split(".")[0] not in whole}
    if terms and all(weight(spec.loss_weights, term) == 0 for term in terms):
        raise UserError(f"stages.{name}.loss_weights: every term counts 0, so that nothing is learned")
