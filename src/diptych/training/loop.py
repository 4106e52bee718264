"""The training loop: stages in order, one visible loop, plain functions called at named points."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from diptych.core import stopping
from diptych.core.draws import Draws, key
from diptych.core.errors import UserError
from diptych.core.progress import progress_bar
from diptych.core.sample import Batch
from diptych.data import loader
from diptych.data.mixture import Mixture
from diptych.systems.base import System
from diptych.training import state
from diptych.training.config import Balance, RunConfig, StageConfig
from diptych.training.ema import EMA
from diptych.training.metrics import Drawn, Metrics
from diptych.training.objective import OWN_LOSSES, Objective
from diptych.training.optimizers import apply_update, build_optimizers, set_rate, trainable
from diptych.training.parallel import clip, prepare
from diptych.training.saving import Saver
from diptych.training.schedule import factor
from diptych.training.step import (
    Outcome,
    agree,
    backward,
    counts_of,
    fetch,
    mean_losses,
    not_finite,
    not_usable,
    precision,
)

log = logging.getLogger(__name__)

COMPARED = 64
"""Items of each source that a resumed run looks at again."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage's configuration with its data; `held_out` are batches whose loss is measured but never trained on, and
    `objective` says what the loss is."""

    config: StageConfig
    data: Mixture
    held_out: Sequence[Batch] = ()
    objective: Objective = OWN_LOSSES


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run lives and what is called on the way.

    recipe: the resolved recipe, stored in every checkpoint. on_stage(position): before a stage. on_sample(step): draws
    pictures with the averaged weights. on_score(step): the scores of these weights by task.
    """

    folder: Path
    config: RunConfig
    seed: int
    recipe: dict[str, Any]
    resume: bool = False
    on_stage: Callable[[int], None] | None = None
    on_sample: Callable[[int], Drawn] | None = None
    on_score: Callable[[int], dict[str, float]] | None = None


def train(system: System, stages: Sequence[Stage], run: Run, accelerator: Accelerator) -> bool:
    """Run the stages in order, from the last checkpoint with `run.resume`; of a sharded run the system is sharded.

    Returns:
        True when all stages are done, False when a signal stopped the run after saving.

    Raises:
        UserError: a loss or gradient that is not finite, a checkpoint that cannot be written or does not fit.
    """
    last = newest_checkpoint(run.folder / "checkpoints", accelerator) if run.resume else None
    progress = state.read_progress(last) if last else state.Progress()
    trackers: dict[str, Any] = {"tensorboard": run.config.tensorboard, "trackers": run.config.trackers}
    whole = progress.total - progress.pending
    metrics = Metrics(run.folder, start=whole, recipe=run.recipe, main=accelerator.is_main_process, **trackers)
    learned: set[str] = set()
    with closing(metrics), stop_signal() as stopped:
        for position, stage in enumerate(stages):
            freeze(system, stage.config.train)
            learned |= set(trainable(system))
            if position < progress.stage:
                continue
            if position > progress.stage:
                progress, last = state.Progress(stage=position, total=progress.total), None
            if run.on_stage:
                run.on_stage(position)
            if not train_stage(system, stage, run, accelerator, progress, last, learned, metrics, stopped):
                return False
    return True


def train_stage(
    system: System,
    stage: Stage,
    run: Run,
    accelerator: Accelerator,
    progress: state.Progress,
    last: Path | None,
    learned: set[str],
    metrics: Metrics,
    stopped: Callable[[], bool],
) -> bool:
    """One stage, from `progress.step`; ends with a checkpoint and then with the averaged weights in place."""
    config, often, objective = stage.config, run.config, stage.objective
    main, rank, world = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    model = prepare(system, accelerator, objective)
    parameters = trainable(system)
    optimizers = build_optimizers(config.optimizer, parameters, system.shard_units())
    ema = EMA(parameters, config.ema_decay, config.ema_warmup) if config.ema_decay else None
    weights = {name: parameter for name, parameter in system.named_parameters() if name in learned}
    train_state = state.TrainState(weights=weights, parameters=parameters, optimizers=optimizers, ema=ema)
    if last:
        state.load(last, train_state)
    check_items(stage, progress)
    saved, whole = progress.total if last else None, True
    checkpoints = run.folder / "checkpoints"
    saver = Saver(checkpoints, keep=often.keep_checkpoints, keep_stages=often.keep_stages, rank=rank, world=world)
    if last and main:
        saver.remove_old()
    outcomes: list[Outcome] = []  # of the steps since the last fetch
    skip = torch.zeros((), device=accelerator.device)  # 1.0 from the first loss or gradient on that is no number

    def read_outcomes() -> None:
        first = progress.total - len(outcomes)
        for number, (reports, norm) in enumerate(fetch(outcomes, config.balance)):
            if bad := not_finite(reports, norm):
                # Nothing has been learned since: the weights are those before this step.
                back = progress.total - first - number
                progress.step, progress.total, progress.pending = progress.step - back, progress.total - back, False
                if ema:
                    ema.steps -= back
                outcomes.clear()
                if saved != progress.total:
                    save()
                saver.finish()
                where = f"stage {config.name!r}, step {progress.step}"
                raise UserError(f"{where}: {bad}; saved in {checkpoints}")
            progress.note({**mean_losses(reports), "grad_norm": norm})
        outcomes.clear()

    def save(alone: bool = False) -> None:
        nonlocal saved
        if not alone:
            read_outcomes()
        metrics.sync()
        writer = Saver(checkpoints, keep=often.keep_checkpoints, keep_stages=often.keep_stages) if alone else saver
        writer.start(progress, train_state, run.recipe, check=saved is None)
        if alone:
            writer.finish()
        saved = progress.total

    def rescue() -> None:
        if world == 1:
            saver.finish()
        if whole and main and saved != progress.total > 0 and not isinstance(system, FSDPModule):
            save(alone=world > 1)
            if world == 1:
                saver.finish()
            log.warning("stopped by an error; step %d is saved in %s", progress.total, checkpoints)

    def follow(rate: float, bar: Any) -> None:
        """What comes after a step: its row, held-out losses, pictures and scores."""
        ends = progress.step == config.steps
        logged = progress.total % often.log_every == 0 or ends
        if logged:
            read_outcomes()
            row = {**progress.means(), "lr": rate}
            metrics.write(progress.total, config.name, row)
            shown = {name: f"{x:.4f}" for name, x in row.items() if name.startswith("loss/")}
            bar.set_postfix(shown, refresh=False)
        if due(progress.step, often.validate_every, ends) and stage.held_out:
            with ema.applied() if ema else nullcontext():
                row = validate(
                    system, stage.held_out, key(run.seed, "held out"), accelerator, config.balance, objective
                )
            metrics.write(progress.total, config.name, row)
            set_modes(system, config.train)
        if due(progress.step, often.sample_every, ends) and run.on_sample:
            with ema.applied() if ema else nullcontext():
                drawn = run.on_sample(progress.total)
            metrics.draw(progress.total, config.name, drawn)
            set_modes(system, config.train)
        if due(progress.step, often.score_every, ends) and run.on_score:
            with ema.applied() if ema else nullcontext():
                row = run.on_score(progress.total)
            metrics.write(progress.total, config.name, {f"score/{task}": score for task, score in row.items()})
            set_modes(system, config.train)
        progress.unlogged = {} if logged else progress.unlogged
        progress.pending = False

    steps = loader.steps(
        stage.data,
        objective.preparer(system),
        progress.step,
        config.steps,
        micro_batch_size=config.micro_batch_size,
        workers=often.num_workers,
        rank=rank,
        world=world,
        same_tasks=isinstance(system, FSDPModule) and not system.runs_every_unit,
        pin=accelerator.device.type == "cuda",
    )
    title = {"total": config.steps, "initial": progress.step, "disable": not main}
    with saving_first(rescue), progress_bar(config.name, "step", **title) as bar:
        if progress.pending:  # an error after the step of the checkpoint ended the run
            follow(config.optimizer.lr * factor(config.schedule, progress.step - 1, config.steps), bar)
            save()
        for step in steps:
            # Draws and rate are functions of the step's number, never of what came before.
            torch.manual_seed(key(run.seed, config.name, step.number, rank))
            rate = config.optimizer.lr * factor(config.schedule, step.number, config.steps)
            set_rate(optimizers, rate)
            # The processes agree: counts for the loss, passes to run, whether to stop.
            plan = agree(step, system, config.balance, stopped(), saver.status(), objective)
            saver.advance(plan.saving)
            # Gradients, their norm, and whether they are numbers.
            terms = backward(model, plan, config, accelerator)
            norm = clip(list(parameters.values()), config.max_grad_norm)
            outcomes.append(Outcome(step=step, terms=terms, norm=norm))
            skip = torch.maximum(skip, not_usable(outcomes[-1], accelerator))
            # The update; a step whose gradients are no numbers leaves weights and averages as they are.
            whole = False  # an error within the next lines leaves weights of no step
            apply_update(optimizers, skip)
            if ema:
                ema.update(skip)

            # What is logged, drawn, scored and saved after it.
            progress.step, progress.total, progress.pending = progress.step + 1, progress.total + 1, True
            whole = True
            ends = progress.step == config.steps
            bar.update()
            follow(rate, bar)
            if due(progress.step, often.save_every, ends) or ends or plan.stop:
                save()
            if plan.stop and not ends:
                saver.finish()
                return False
    saver.finish()
    if ema:
        ema.copy_in()
    return True


@contextmanager
def saving_first(rescue: Callable[[], None]) -> Iterator[None]:
    """Call `rescue` before an error that ends the block goes on; an error of its own changes nothing about that."""
    try:
        yield
    except Exception:
        try:
            rescue()
        except (UserError, OSError) as error:
            log.warning("%s", error)
        raise


def newest_checkpoint(folder: Path, accelerator: Accelerator) -> Path | None:
    """The last checkpoint that is whole; the main process chooses it for all."""
    newest = [state.newest(folder, move=True) if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(newest)
    return newest[0]


def check_items(stage: Stage, progress: state.Progress) -> None:
    """Note how many items the stage's sources have; UserError where a resumed run has others than it began with.

    Where they are as many, but some of them have changed (of 64 of each source), a warning says so.
    """
    before, progress.items = progress.items, {}
    for source in stage.data.sources:
        count = len(source)
        some = [source.fingerprint(index * count // COMPARED) for index in range(COMPARED)] if count else []
        progress.items[source.name] = (count, f"{key(*some):x}")
        then = before.get(source.name, progress.items[source.name])
        if then[0] != count:
            raise UserError(
                f"stage {stage.config.name!r}: {source.name} has {count:,} items, but had {then[0]:,} when the run "
                "began; other items would be drawn: put them back, or begin a new run with this one as its start"
            )
        if then != progress.items[source.name]:
            log.warning("%s: some of its items have changed since the run began", source.name)


def due(step: int, every: int, ends: bool) -> bool:
    """Whether something that happens each `every` steps and at a stage's end happens now; never for 0."""
    return every > 0 and (step % every == 0 or ends)


def freeze(system: System, parts: Sequence[str]) -> None:
    """Only the named parts learn; the others are in eval mode."""
    known = system.named_parts()
    system.requires_grad_(False)
    for name in parts:
        known[name].requires_grad_(True)
    set_modes(system, parts)


def set_modes(system: System, parts: Sequence[str]) -> None:
    """Train mode where something learns, eval mode in the other parts."""
    system.train()
    for name, part in system.named_parts().items():
        if name not in parts:
            part.eval()


@torch.no_grad()
def validate(
    system: System,
    batches: Sequence[Batch],
    seed: int,
    accelerator: Accelerator,
    balance: Balance = "samples",
    objective: Objective = OWN_LOSSES,
) -> dict[str, float]:
    """Mean held-out loss of each term, with the same draws every time; every process measures all of it.

    A sample's draws are those of its place among all, however these are cut into batches.
    """
    sums: dict[str, list[Tensor]] = {}
    weights: dict[str, list[float]] = {}
    system.eval()
    preparer = objective.preparer(system)
    place = 0
    for batch in batches:
        draws = Draws([key(seed, place + row) for row in range(len(batch))], accelerator.device)
        place += len(batch)
        prepared = preparer.together(batch.samples, draws).to(system.device)
        with precision(accelerator):
            terms = objective.losses(system, prepared, draws)
        for name, values in terms.items():
            counts = counts_of(prepared, balance)[name]
            sums.setdefault(name, []).append(values.float() * torch.tensor(counts, device=values.device))
            weights.setdefault(name, []).extend(counts)
    return {f"held_out/{name}": float(torch.cat(x).sum()) / (sum(weights[name]) or 1.0) for name, x in sums.items()}


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """SIGTERM and Ctrl-C ask the loop to save and stop; a second Ctrl-C stops at once.

    Outside the main thread, where Python takes no signals, nothing changes.
    """
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopping.note(number)
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
