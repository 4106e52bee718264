"""Optimisers, averages, schedules, steps that go wrong, and signals; each by itself."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.prepared import PreparedBatch
from diptych.recipes.build import build_system
from diptych.recipes.recipe import parse
from diptych.recipes.run import train_recipe
from diptych.systems.composed import ComposedSystem
from diptych.training import saving, state
from diptych.training.config import OptimizerConfig, RunConfig, ScheduleConfig, StageConfig
from diptych.training.ema import EMA
from diptych.training.loop import freeze, stop_signal
from diptych.training.metrics import Metrics, read_metrics
from diptych.training.muon import Muon
from diptych.training.optimizers import apply_update, build_optimizers, set_rate, trainable
from diptych.training.saving import Saver
from diptych.training.schedule import factor
from diptych.training.step import Report, mean_losses, not_finite, precision, weight


def test_muon_takes_the_matrices_inside_blocks(tiny_plain: dict[str, Any]) -> None:
    system = build_system(parse(tiny_plain).system, meta=True)
    freeze(system, ["decoder", "queries"])
    parameters = trainable(system)
    muon, adamw = build_optimizers(OptimizerConfig(kind="muon"), parameters, system.shard_units())
    assert isinstance(muon, torch.optim.Muon)
    rows = [
        [parameter for group in optimizer.param_groups for parameter in group["params"]] for optimizer in (muon, adamw)
    ]
    names = {id(parameter): name for name, parameter in parameters.items()}
    taken, rest = ({names[id(parameter)] for parameter in row} for row in rows)
    assert len(rows[0]) == len(taken)
    assert taken | rest == set(parameters)
    assert not taken & rest
    assert all(parameters[name].ndim == 2 and "_blocks." in name for name in taken)
    assert {"conditioner.queries", "decoder.final.weight", "decoder.image_in.weight", "decoder.text_in.weight"} <= rest
    assert not any(parameters[name].ndim == 2 for name in rest if "_blocks." in name)
    (only,) = build_optimizers(OptimizerConfig(), parameters, system.shard_units())
    assert isinstance(only, torch.optim.AdamW)
    set_rate([muon, adamw], 0.25)
    assert {group["lr"] for optimizer in (muon, adamw) for group in optimizer.param_groups} == {0.25}


def test_frozen_parts_are_in_eval_mode(tiny_plain: dict[str, Any]) -> None:
    system = build_system(parse(tiny_plain).system, meta=True)
    assert isinstance(system, ComposedSystem)
    freeze(system, ["decoder"])
    assert system.decoder.training
    assert system.decoder.double_blocks.training  # type: ignore[union-attr]
    assert not system.conditioner.training
    assert not any(module.training for part in system.backbone.named_parts().values() for module in part.children())
    assert {name.split(".")[0] for name in trainable(system)} == {"decoder"}


def test_ema_by_hand() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    ema = EMA({"w": parameter}, 0.5)
    expected = 1.0
    for step, value in enumerate((3.0, 5.0, -1.0), start=1):
        with torch.no_grad():
            parameter.fill_(value)
        ema.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert ema.average["w"].item() == pytest.approx(expected)
    with ema.applied():
        assert parameter.item() == pytest.approx(expected)
    assert parameter.item() == -1.0
    ema.copy_in()
    assert parameter.item() == pytest.approx(expected)


def test_a_skipped_step_leaves_the_averages() -> None:
    """Mutant: `skip` ignored."""
    parameter = nn.Parameter(torch.tensor([1.0]))
    ema = EMA({"w": parameter}, 0.5)
    with torch.no_grad():
        parameter.fill_(3.0)
    ema.update(torch.tensor(1.0))
    assert ema.average["w"].item() == 1.0
    ema.update(torch.tensor(0.0))
    assert ema.average["w"].item() != 1.0


def test_ema_without_warm_up_by_hand() -> None:
    """BAGEL's release: the weights at the start keep d^n."""
    parameter = nn.Parameter(torch.tensor([0.0]))
    ema = EMA({"w": parameter}, 0.9999, warmup=False)
    ema.average["w"].fill_(1.0)
    for _ in range(100):
        ema.update()
    assert ema.average["w"].item() == pytest.approx(0.9999**100, rel=1e-5)
    with pytest.raises(UserError, match="ema_warmup has no effect"):
        StageConfig(name="a", train=("llm",), steps=1, batch_size=1, ema_warmup=False)


def test_bf16_on_a_cpu_writes_attention_out() -> None:
    q = torch.randn(2, 2, 8, 16, requires_grad=True)

    def kernel(mixed: str) -> tuple[str, torch.dtype]:
        AcceleratorState._reset_state(reset_partial_state=True)
        with precision(Accelerator(mixed_precision=mixed, cpu=True)):
            out = F.scaled_dot_product_attention(q, q, q)
        assert out.grad_fn is not None
        return out.grad_fn.name(), out.dtype

    fused, plain = kernel("no"), kernel("bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "Flash" in fused[0]
    assert fused[1] == torch.float32
    assert "Flash" not in plain[0]
    assert plain[1] == torch.bfloat16


def test_schedules() -> None:
    warm = ScheduleConfig(warmup=4, start=0.2)
    assert [factor(warm, step, 10) for step in range(5)] == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0])
    cosine = ScheduleConfig(kind="cosine", warmup=2, end=0.1)
    shares = [factor(cosine, step, 11) for step in range(11)]
    assert shares[1] == shares[2] == 1.0
    assert shares[6] == pytest.approx(0.55)
    assert shares[10] == pytest.approx(0.1)
    assert shares[2:] == sorted(shares[2:], reverse=True)
    assert factor(cosine, 17, 11) == factor(cosine, 10, 11)  # other libraries' cosines rise again


def test_weights_of_terms() -> None:
    weights = {"flow": 2.0, "flow.edit": 3.0}
    assert [weight(weights, name) for name in ("flow.image", "flow.edit", "cross_entropy.understand")] == [2, 3, 1]


def test_losses_are_means_over_all_processes() -> None:
    one = Report(losses={"flow.image": [1.0, 2.0]}, weights={"flow.image": [1.0, 3.0]}, ids={"image": ["a", "b"]})
    two = Report(
        losses={"flow.image": [6.0], "flow.edit": [4.0]},
        weights={"flow.image": [1.0], "flow.edit": [1.0]},
        ids={"image": ["c"], "edit": ["d"]},
    )
    assert mean_losses([one, two]) == {"loss/flow.edit": 4.0, "loss/flow.image": (1 + 3 * 2 + 6) / 5}
    assert not_finite([one, two], 1.0) == ""
    assert "samples a, b, c, d" in not_finite([one, two], float("inf"))
    bad = Report(
        losses={"flow.edit": [1.0, float("nan")]},
        weights={"flow.edit": [1.0, 1.0]},
        ids={"edit": ["e", "f"]},
    )
    assert not_finite([one, bad], 1.0) == "loss flow.edit is not finite for task 'edit', samples f"


@pytest.mark.slow
@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_after_saving(
    poison: str, tiny_plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad third step: the run says where, keeps the weights before it, and goes on when the cause is gone."""
    tiny_plain["stages"]["mix"]["steps"] = 4
    folder, calls, culprits = tmp_path / "run", 0, list[str]()
    losses = ComposedSystem.losses

    def bad(system: ComposedSystem, batch: PreparedBatch, draws: Draws) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        terms = losses(system, batch, draws)
        if calls == 3 and poison == "loss":
            task = next(iter(terms)).removeprefix("flow.")
            culprits.append(batch.ids[batch.tasks.index(task)])
            name = next(iter(terms))
            terms[name] = terms[name] * torch.tensor([float("nan")] + [1.0] * (len(terms[name]) - 1))
        if calls == 3 and poison == "gradient":
            terms = {name: values + 0 * torch.sqrt(values - values.detach()) for name, values in terms.items()}
        return terms

    with monkeypatch.context() as patch:
        patch.setattr(ComposedSystem, "losses", bad)
        with pytest.raises(UserError) as error:
            train_recipe(parse(tiny_plain), tiny_plain, folder)
    assert "stage 'mix', step 2: " in str(error.value)
    if poison == "loss":
        assert f"samples {culprits[0]}; saved in" in str(error.value)
        assert "is not finite for task" in str(error.value)
    else:
        assert "the gradient's norm is nan though every loss is finite" in str(error.value)
    (checkpoint,) = state.checkpoints(folder / "checkpoints")
    assert state.read_progress(checkpoint).step == 2
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2]
    assert train_recipe(parse(tiny_plain), tiny_plain, folder, resume=True)
    assert train_recipe(parse(tiny_plain), tiny_plain, tmp_path / "whole")
    assert read_metrics(folder / "metrics.jsonl") == read_metrics(tmp_path / "whole" / "metrics.jsonl")


def test_random_frozen_parts_are_of_the_seed(tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    """Queries that never learn come back alike from a checkpoint that does not hold them."""
    from diptych.recipes.load import load_system

    tiny_plain["stages"]["mix"] |= {"train": ["decoder"], "steps": 1}
    assert train_recipe(parse(tiny_plain), tiny_plain, tmp_path / "run")
    finished, _ = load_system(str(tmp_path / "run"))
    (tmp_path / "run" / "model").rename(tmp_path / "model")
    unfinished, _ = load_system(str(tmp_path / "run"))
    assert isinstance(finished, ComposedSystem)
    assert isinstance(unfinished, ComposedSystem)
    assert torch.equal(finished.conditioner.queries, unfinished.conditioner.queries)  # type: ignore[arg-type]


def test_signals_ask_and_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signal() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_signals_outside_the_main_thread() -> None:
    found: list[bool] = []

    def enter() -> None:
        with stop_signal() as stopped:
            found.append(stopped())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]


def test_metrics_are_cut_at_the_resumed_step(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        metrics.write(step, "mix", {"loss": step / 3})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "sta')  # cut off by a kill
    Metrics(tmp_path, start=2, tensorboard=False, main=False).close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    Metrics(tmp_path, start=2, tensorboard=False).close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "stage": "mix", "loss": 1 / 3},
        {"step": 2, "stage": "mix", "loss": 2 / 3},
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}


def test_keep_and_leftovers(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    held = state.TrainState(weights={"w": parameter}, parameters={"w": parameter}, optimizers=[], ema=None)
    (tmp_path / ".step-00000001.4000001.partial").mkdir(parents=True)
    saver = Saver(tmp_path, keep=2)
    (tmp_path / "step-00000009").mkdir()  # no progress.json: never complete, never read
    for total in (1, 2, 3, 4):
        saver.start(state.Progress(total=total), held, {})
    saver.finish()
    assert [path.name for path in state.checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    held = state.TrainState(weights={"w": parameter}, parameters={"w": parameter}, optimizers=[], ema=None)
    monkeypatch.setattr(saving, "read_tensors", lambda files: iter([("w", torch.ones(2))]))
    saver = Saver(tmp_path, keep=2)
    saver.start(state.Progress(total=1), held, {}, check=True)
    with pytest.raises(UserError, match="w reads back differently"):
        saver.finish()
    assert not list(tmp_path.iterdir()), "nothing of it is left"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunConfig(keep_checkpoints=0), "keep_checkpoints must be at least 1"),
        (lambda: RunConfig(log_every=0), "log_every must be at least 1"),
        (lambda: RunConfig(save_every=-1), "save_every must be at least 0"),
        (lambda: StageConfig(name="a", train=(), steps=1, batch_size=1), "trains nothing"),
        (lambda: StageConfig(name="a", train=("decoder",), steps=0, batch_size=1), "steps must be at least 1"),
        (
            lambda: StageConfig(name="a", train=("decoder",), steps=1, batch_size=1, ema_decay=1.0),
            "ema_decay must be between",
        ),
        (lambda: StageConfig(name="a", train=("decoder",), steps=1, batch_size=1, micro_batch_size=0), "micro_batch"),
    ],
)
def test_bad_numbers(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_muon_is_torchs() -> None:
    """The same steps as torch.optim.Muon, whose iterations run in bfloat16; and none where it is to be skipped."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(12, 8)) for _ in range(3)]
    for matrix in weights[1:]:
        matrix.data.copy_(weights[0].data)
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    theirs, ours, skipped = torch.optim.Muon([weights[0]], **options), Muon([weights[1]], **options), Muon([weights[2]])
    for _ in range(3):
        grad = torch.randn(12, 8)
        for matrix in weights:
            matrix.grad = grad.clone()
        theirs.step()
        apply_update([ours], torch.zeros(()))
    assert float((weights[0] - weights[1]).detach().abs().max()) < 1e-3
    before = weights[2].detach().clone()
    weights[2].grad = torch.full((12, 8), float("nan"))
    apply_update([skipped], torch.ones(()))
    assert torch.equal(weights[2], before)
    assert not skipped.state[weights[2]]["momentum_buffer"].any()
