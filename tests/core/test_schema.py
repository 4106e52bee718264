"""Plain values to dataclasses: strict, with a place and a guess."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from diptych.core.errors import UserError
from diptych.core.schema import read


@dataclass(frozen=True)
class Rates:
    peak: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class Shape:
    kind: str


@dataclass(frozen=True)
class Circle:
    kind: Literal["circle"]
    radius: int


@dataclass(frozen=True)
class Square:
    kind: Literal["square"]
    side: int = 2

    def __post_init__(self) -> None:
        if self.side < 1:
            raise UserError(f"side must be at least 1, not {self.side}")


@dataclass(frozen=True)
class Plan:
    steps: int
    name: str = "plan"
    on: bool = False
    size: int | tuple[int, int] = 32
    share: float | Literal["flux"] = 1.0
    limit: float | None = None
    parts: tuple[str, ...] = ()
    rates: Rates = field(default_factory=Rates)
    shapes: dict[str, Shape] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    lists: list[int] = field(default_factory=list)


VARIANTS = {Shape: {"circle": Circle, "square": Square}}


def plan(**values: Any) -> Plan:
    return read(Plan, {"steps": 1, **values}, "plan", VARIANTS)


def test_what_is_read() -> None:
    made = plan(
        on=True,
        size=[16, 32],
        share="flux",
        limit="1e-4",
        parts=["a", "b"],
        rates={"peak": "2e-5", "betas": [0, 1]},
        shapes={"one": {"kind": "circle", "radius": 3}, "two": {"kind": "square"}},
        extra={"anything": [1, {"goes": None}]},
        lists=[1, 2],
    )
    assert (made.size, made.share, made.limit, made.parts) == ((16, 32), "flux", 1e-4, ("a", "b"))
    assert made.rates == Rates(peak=2e-5, betas=(0.0, 1.0))
    assert all(isinstance(beta, float) for beta in made.rates.betas)
    assert made.shapes == {"one": Circle("circle", 3), "two": Square("square")}
    assert made.extra == {"anything": [1, {"goes": None}]}
    assert plan(limit=None) == plan() == Plan(steps=1)
    assert plan(share=2).share == 2.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": 2}, "plan: unknown key 'step'. Did you mean 'steps'?"),
        ({"rates": {"peek": 1}}, "plan.rates: unknown key 'peek'. Did you mean 'peak'?"),
        ({"steps": "many"}, "plan.steps: needs a whole number, not 'many'"),
        ({"steps": 2.0}, "plan.steps: needs a whole number, not 2.0"),
        ({"steps": True}, "plan.steps: needs a whole number, not True"),
        ({"steps": None}, "plan.steps: needs a whole number, not null"),
        ({"on": 1}, "plan.on: needs true or false, not 1"),
        ({"name": 3}, "plan.name: needs text, not 3"),
        ({"rates": {"peak": "fast"}}, "plan.rates.peak: needs a number, not 'fast'"),
        ({"rates": {"betas": [0.9]}}, "plan.rates.betas: needs 2 values, not 1"),
        ({"rates": {"betas": [0.9, "x"]}}, "plan.rates.betas[1]: needs a number, not 'x'"),
        ({"rates": [1]}, "plan.rates: needs a mapping, not list"),
        ({"parts": "decoder"}, "plan.parts: needs a list, not 'decoder'"),
        ({"lists": [1, "b"]}, "plan.lists[1]: needs a whole number, not 'b'"),
        ({"shapes": {"one": {"radius": 3}}}, "plan.shapes.one: 'kind' is missing. Choices: circle, square."),
        ({"shapes": {"one": {"kind": "circel"}}}, "plan.shapes.one: unknown kind 'circel'. Did you mean 'circle'?"),
        ({"shapes": {"one": {"kind": "circle"}}}, "plan.shapes.one: 'radius' is missing"),
        ({"shapes": {"one": {"kind": "square", "side": 0}}}, "plan.shapes.one: side must be at least 1, not 0"),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        plan(**values)
    assert str(error.value).startswith(message)


def test_what_is_missing() -> None:
    with pytest.raises(UserError, match="plan: 'steps' is missing"):
        read(Plan, {"name": "x"}, "plan")
