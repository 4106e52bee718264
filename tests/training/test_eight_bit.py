"""AdamW with moments of a byte: it learns, leaves all as it is where it is told to, and a run goes on exactly."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diptych.core.errors import UserError
from diptych.recipes.recipe import parse
from diptych.recipes.run import train_recipe
from diptych.training import state
from diptych.training.config import OptimizerConfig
from diptych.training.metrics import read_metrics
from diptych.training.optimizers import apply_update, build_optimizers


def parameters(kind: str, seed: int = 0) -> tuple[nn.Parameter, list[torch.optim.Optimizer]]:
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(64, 128, generator=generator))
    config = OptimizerConfig(kind=kind, lr=1e-2, betas=(0.6, 0.8), eps=0.5, weight_decay=1.0)  # pyright: ignore[reportArgumentType]
    return weight, build_optimizers(config, {"weight": weight}, [])


def test_it_follows_adamw() -> None:
    """Mutants: rate, betas, eps or weight decay not passed on. Moments of a byte differ by little from whole ones."""
    (whole, exact), (small, eight) = parameters("adamw"), parameters("adamw8bit")
    generator = torch.Generator().manual_seed(1)
    start = whole.detach().clone()
    for _ in range(20):
        gradient = torch.randn(64, 128, generator=generator)
        for weight, optimizers in ((whole, exact), (small, eight)):
            weight.grad = gradient.clone()
            apply_update(optimizers, torch.zeros(()))
    moved = (whole.detach() - start).norm()
    assert float((small.detach() - whole.detach()).norm() / moved) < 0.05
    dtypes = {entry: value.dtype for entry, value in eight[0].state[small].items() if isinstance(value, torch.Tensor)}
    assert dtypes["state1"] == dtypes["state2"] == torch.uint8


def test_a_step_that_is_skipped_changes_nothing() -> None:
    weight, optimizers = parameters("adamw8bit")
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, torch.nan)
    apply_update(optimizers, torch.ones(()))
    assert torch.equal(weight, before)
    assert weight.grad is None
    assert not optimizers[0].state


def recipe_of(plain: dict[str, Any], steps: int = 6) -> dict[str, Any]:
    plain = json.loads(json.dumps(plain))
    plain["stages"]["mix"] |= {"steps": steps, "optimizer": {"kind": "adamw8bit", "lr": 1e-3}}
    plain["run"] |= {"save_every": 3, "keep_checkpoints": 9}
    return plain


def test_a_run_goes_on_exactly(tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    """Mutants: the state lost, or read in another format."""
    plain = recipe_of(tiny_plain)
    assert train_recipe(parse(plain), plain, tmp_path / "whole")
    first = tmp_path / "resumed"
    assert train_recipe(parse(plain), plain, first)
    (checkpoint,) = [path for path in state.checkpoints(first / "checkpoints") if path.name.endswith("6")]
    for path in sorted(checkpoint.iterdir(), reverse=True):
        path.unlink()
    checkpoint.rmdir()
    for path in (first / "model").iterdir():
        path.unlink()
    (first / "model").rmdir()
    assert train_recipe(parse(plain), plain, first, resume=True)
    assert read_metrics(first / "metrics.jsonl") == read_metrics(tmp_path / "whole" / "metrics.jsonl")
    for kind in ("trained", "optimizer"):
        one, two = (state.Stored(path / "checkpoints" / checkpoint.name, kind) for path in (tmp_path / "whole", first))
        assert one.chunks.keys() == two.chunks.keys()
        assert all(torch.equal(one.read(name), two.read(name)) for name in one.chunks)


def test_it_is_refused_where_weights_are_divided(tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    from diptych.recipes.start import refuse_division

    plain = recipe_of(tiny_plain)
    plain["run"]["strategy"] = "fsdp"
    with pytest.raises(UserError, match=r"stages\.mix\.optimizer\.kind: adamw8bit takes whole parameters"):
        refuse_division(parse(plain))


def test_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_import = builtins.__import__

    def absent(name: str, *given: Any, **more: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="bitsandbytes")
        return plain_import(name, *given, **more)

    monkeypatch.delitem(sys.modules, "diptych.training.eight_bit", raising=False)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(
        UserError, match=r"optimizer\.kind adamw8bit: bitsandbytes is missing; pip install 'diptych\[qu"
    ):
        parameters("adamw8bit")
    there = nn.Parameter(torch.empty(64, 128, device="meta"))
    assert build_optimizers(OptimizerConfig(kind="adamw8bit"), {"weight": there}, []), "its memory is told without it"
