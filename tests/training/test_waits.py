"""The host does not wait for the device within a step, but where metrics are logged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from diptych.core.prepared import PreparedBatch
from diptych.recipes.recipe import parse
from diptych.recipes.run import train_recipe
from diptych.training import loop
from diptych.training.metrics import read_metrics
from diptych.training.step import LossStep

WAITS = {
    torch.ops.aten._local_scalar_dense.default,  # item, tolist, bool, float
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten._unique2.default,
}
"""Operations of which the host reads a result."""


class Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.on = False

    def __enter__(self) -> Any:
        self.on = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.on = False
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in WAITS
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """Counts in all that a step does: passes, clipping, the update, averages, metrics; losses of a system aside."""
    waits = Waits()
    tolist = torch.Tensor.tolist

    def listed(tensor: torch.Tensor) -> Any:  # on a CPU no operation is dispatched
        waits.count += waits.on
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", listed)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with waits:
                return function(*args, **kwargs)

        return call

    for name in ("agree", "backward", "clip", "not_usable", "apply_update"):
        monkeypatch.setattr(loop, name, counted(getattr(loop, name)))
    monkeypatch.setattr(loop.EMA, "update", counted(loop.EMA.update))
    losses = LossStep.forward

    def plain(step: Any, batch: PreparedBatch, draws: Any) -> Any:
        with _disable_current_modes():
            waits.on = False
            terms = losses(step, batch, draws)
            waits.on = True
            return terms

    monkeypatch.setattr(LossStep, "forward", plain)
    return waits


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_waits_for_nothing(kind: str, waits: Waits, tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    """Six steps of which the last is logged. Mutants: `.item()` of the norm, of a loss, or in the update."""
    plain = copy.deepcopy(tiny_plain)
    plain["stages"]["mix"] |= {"steps": 6, "ema_decay": 0.9, "optimizer": {"kind": kind}}
    plain["run"]["log_every"] = 6
    assert train_recipe(parse(plain), plain, tmp_path / "run")
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert row["grad_norm"] > 0
    assert waits.count == 0


def test_a_wait_is_counted(
    waits: Waits, tiny_plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = loop.clip

    def waiting(*args: Any) -> Any:
        norm = clip(*args)
        with waits:
            norm.item()
            norm.tolist()
        return norm

    monkeypatch.setattr(loop, "clip", waiting)
    assert train_recipe(parse(tiny_plain), tiny_plain, tmp_path / "run")
    assert waits.count == 2 * 3
