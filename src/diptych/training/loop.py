"""The training loop: stages in order, one visible loop, plain functions called at named points."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from diptych.core.draws import Draws, key
from diptych.core.errors import UserError
from diptych.core.sample import Batch
from diptych.data.loader import load_steps
from diptych.data.mixture import Mixture
from diptych.systems.base import System
from diptych.training import state
from diptych.training.config import RunConfig, StageConfig
from diptych.training.ema import EMA
from diptych.training.metrics import Metrics
from diptych.training.optimizers import build_optimizers, set_rate, trainable
from diptych.training.schedule import factor

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage's configuration with its data; `held_out` are batches whose loss is measured but never trained on."""

    config: StageConfig
    data: Mixture
    held_out: Sequence[Batch] = ()


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run lives and what is called on the way.

    recipe: the resolved recipe, stored in every checkpoint. on_sample(step): draws pictures with the averaged weights.
    """

    folder: Path
    config: RunConfig
    seed: int
    recipe: dict[str, Any]
    resume: bool = False
    on_sample: Callable[[int], None] | None = None
    stop_after: int | None = None


class LossStep(nn.Module):
    """Gives a system's losses as a forward pass, which data-parallel wrappers need."""

    def __init__(self, system: System) -> None:
        super().__init__()
        self.system = system

    def forward(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        return self.system.losses(batch, draws)


def train(
    system: System,
    stages: Sequence[Stage],
    run: Run,
    accelerator: Accelerator,
    on_stage: Callable[[int], None] = lambda position: None,
) -> bool:
    """Run the stages in order, from the last checkpoint with `run.resume`; `on_stage` is called before each.

    Returns:
        True when all stages are done, False when a signal stopped the run after saving.
    """
    last = (state.checkpoints(run.folder / "checkpoints") or [None])[-1] if run.resume else None
    progress = state.read_progress(last) if last else state.Progress()
    metrics = (
        Metrics(run.folder, start=progress.total, tensorboard=run.config.tensorboard)
        if (accelerator.is_main_process)
        else None
    )
    learned: dict[str, nn.Parameter] = {}
    with stop_signal() as stopped:
        for position, stage in enumerate(stages):
            if position < progress.stage:
                freeze(system, stage.config.train)
                learned |= trainable(system)
                continue
            if position > progress.stage:
                progress = state.Progress(stage=position, total=progress.total)
            on_stage(position)
            done = train_stage(system, stage, run, accelerator, progress, learned, last, metrics, stopped)
            if not done:
                break
            last = None
        else:
            position = len(stages)
    if metrics:
        metrics.close()
    return position == len(stages)


def train_stage(
    system: System,
    stage: Stage,
    run: Run,
    accelerator: Accelerator,
    progress: state.Progress,
    learned: dict[str, nn.Parameter],
    last: Path | None,
    metrics: Metrics | None,
    stopped: Callable[[], bool],
) -> bool:
    """One stage, from `progress.step`; ends with a checkpoint and with the averaged weights in place."""
    config = stage.config
    freeze(system, config.train)
    model, parameters, optimizers = prepare(system, config, accelerator)
    learned |= parameters
    if last is not None:
        state.load_weights(last, learned)
    ema = EMA(parameters, config.ema) if config.ema else None
    if last is not None:
        state.load_optimizers(last, parameters, optimizers, ema)
    rank, world = accelerator.process_index, accelerator.num_processes
    bar = tqdm(
        total=config.steps,
        initial=progress.step,
        desc=config.name,
        unit="step",
        disable=not accelerator.is_main_process,
        dynamic_ncols=True,
        mininterval=1.0,
    )
    saved = progress.step
    checked = last is not None

    def save() -> None:
        nonlocal saved, checked
        progress.ema_steps = ema.steps if ema else 0
        state.save(
            run.folder / "checkpoints",
            progress,
            parameters,
            learned,
            optimizers,
            ema,
            run.recipe,
            keep=run.config.keep,
            main=accelerator.is_main_process,
            check=not checked,
        )
        saved, checked = progress.step, True

    steps = load_steps(stage.data, progress.step, config.steps, rank=rank, world=world, workers=run.config.workers)
    clock = time.perf_counter()
    for step, batch, keys in steps:
        rate = config.optimizer.lr * factor(config.schedule, step, config.steps)
        set_rate(optimizers, rate)
        terms = backward(model, batch.to(accelerator.device), keys, config, accelerator)
        bad = [name for name, values in terms.items() if not torch.isfinite(values).all()]
        if accelerator.reduce(torch.tensor(float(bool(bad)), device=accelerator.device)).item() > 0:
            save()
            raise UserError(non_finite(step, terms, batch) + f"; saved at {run.folder / 'checkpoints'}")
        norm = accelerator.clip_grad_norm_(list(parameters.values()), config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.update()
        progress.step, progress.total = step + 1, progress.total + 1
        ends = progress.step == config.steps
        values = {f"loss/{name}": float(x.mean()) for name, x in terms.items()} | {"grad_norm": float(norm or 0)}
        for name, value in values.items():
            progress.sums.setdefault(name, []).append(value)
        if progress.total % run.config.log_every == 0 or ends:
            row = {name: math.fsum(x) / len(x) for name, x in progress.sums.items()} | {"lr": rate}
            progress.sums = {}
            if metrics:
                metrics.write(progress.total, config.name, row)
            bar.set_postfix({k.removeprefix("loss/"): f"{v:.4f}" for k, v in row.items() if k.startswith("loss/")})
        bar.update()
        if due(progress.step, run.config.validate_every, ends) and stage.held_out:
            with ema.applied() if ema else nullcontext():
                row = validate(system, stage.held_out, key(run.seed, "held out"), accelerator)
            if metrics:
                metrics.write(progress.total, config.name, row)
        if due(progress.step, run.config.sample_every, ends and run.config.sample_every > 0) and run.on_sample:
            with ema.applied() if ema else nullcontext():
                run.on_sample(progress.total)
            system.train()
        halt = stopped() or (run.stop_after is not None and progress.total >= run.stop_after)
        if due(progress.step, run.config.save_every, ends) or halt:
            save()
        if halt and not ends:
            bar.close()
            return False
    bar.close()
    log.info("stage %s: %d steps in %.0f s", config.name, config.steps, time.perf_counter() - clock)
    if ema:
        ema.copy_in()
    return True


def due(step: int, every: int, ends: bool) -> bool:
    return ends or (every > 0 and step % every == 0)


def backward(
    model: nn.Module, batch: Batch, keys: Sequence[int], config: StageConfig, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Gradients of the weighted mean loss over this process's samples; unweighted terms, detached."""
    size = config.micro_batch or len(batch)
    starts = range(0, len(batch), size)
    found: dict[str, list[Tensor]] = {}
    for start in starts:
        rows = list(range(start, min(start + size, len(batch))))
        draws = Draws([keys[row] for row in rows], accelerator.device)
        with nullcontext() if start == starts[-1] else accelerator.no_sync(model), accelerator.autocast():
            terms = model(batch.take(rows), draws)
            total = sum(weight(config.weights, name) * values.sum() for name, values in terms.items()) / len(batch)
            accelerator.backward(total)
        for name, values in terms.items():
            found.setdefault(name, []).append(values.detach())
    return {name: torch.cat(values) for name, values in found.items()}


def weight(weights: dict[str, float], name: str) -> float:
    """A term's factor: its own ("flow.image"), else its family's ("flow"), else 1."""
    return weights.get(name, weights.get(name.split(".")[0], 1.0))


def freeze(system: System, parts: Sequence[str]) -> None:
    """Only the named parts learn."""
    known = system.named_parts()
    system.requires_grad_(False)
    for name in parts:
        known[name].requires_grad_(True)
    system.train()


def prepare(
    system: System, config: StageConfig, accelerator: Accelerator
) -> tuple[nn.Module, dict[str, nn.Parameter], list[Any]]:
    """The system wrapped for its devices, its learning parameters by their own names, and their optimisers."""
    model = accelerator.prepare_model(LossStep(system))
    parameters = trainable(accelerator.unwrap_model(model).system)
    return model, parameters, build_optimizers(config.optimizer, parameters, system.shard_units())


@torch.no_grad()
def validate(system: System, batches: Sequence[Batch], seed: int, accelerator: Accelerator) -> dict[str, float]:
    """Mean held-out loss of each term, with the same draws every time."""
    found: dict[str, list[Tensor]] = {}
    system.eval()
    for number, batch in enumerate(batches):
        draws = Draws([key(seed, number, row) for row in range(len(batch))], accelerator.device)
        with accelerator.autocast():
            for name, values in system.losses(batch.to(accelerator.device), draws).items():
                found.setdefault(name, []).append(values)
    system.train()
    return {f"held_out/{name}": float(torch.cat(values).mean()) for name, values in found.items()}


def non_finite(step: int, terms: dict[str, Tensor], batch: Batch) -> str:
    """What to say of a loss that is not a number."""
    for name, values in terms.items():
        task = name.rpartition(".")[2]
        samples = [sample for sample in batch if sample.task == task]
        culprits = [sample.id for sample, value in zip(samples, values, strict=False) if not torch.isfinite(value)]
        if culprits:
            return f"step {step}: loss {name} is not finite for task {task!r}, samples {', '.join(culprits[:8])}"
    return f"step {step}: the loss is not finite on another process"


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """SIGTERM and Ctrl-C ask the loop to save and stop; a second Ctrl-C stops at once."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
