"""What one stage of a run is, as plain data; a recipe writes it down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Interval

from diptych.core.errors import UserError
from diptych.core.ranges import NotNegative, NotNegativeInt, Positive, Share, check_ranges
from diptych.training.metrics import Tracker

BelowOne = Annotated[float, Interval(ge=0, lt=1)]
MUON_MOMENTUM = 0.95

Balance = Literal["samples", "terms", "tokens"]
"""How the losses of a step become one. A value of a sample is the mean over its own elements (latent tokens, text
tokens); a family of terms ("flow", "cross_entropy") is one mean over all its values in the step, whatever the cut into
passes and processes.

samples: families count by their share of the step's samples; within one, a sample counts as its system says (one
each; BAGEL's by `mean`, OmniGen2's by `weighting`). terms: the same means are added, whatever their shares. tokens:
means over all elements are added, as BAGEL's release does.
"""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """kind: `adamw`, `adamw8bit` (bitsandbytes', with moments of a byte each), or `muon` (torch.optim.Muon for the
    matrices inside blocks, AdamW for all else).

    lr: peak learning rate; Muon's is matched to AdamW's scale. betas, eps, weight_decay: as in torch. momentum: Muon's.

    Raises:
        UserError: a value out of its range; a momentum that no optimiser reads.
    """

    kind: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    lr: Positive = 1e-4
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    momentum: BelowOne = MUON_MOMENTUM

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.kind != "muon" and self.momentum != MUON_MOMENTUM:
            raise UserError(f"momentum has no effect with kind {self.kind!r}: only muon has one (AdamW's is in betas)")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """kind: `constant` or `cosine` after a linear warm-up.

    warmup: steps to the peak. start: share of the peak that the warm-up rises from; step 0 is one rise above it.
    end: share of the peak at the last step of `cosine`.

    Raises:
        UserError: a value out of its range; an `end` or a `start` that the schedule never reads.
    """

    kind: Literal["constant", "cosine"] = "constant"
    warmup: NotNegativeInt = 0
    start: Share = 0.0
    end: Share = 0.0

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.kind == "constant" and self.end:
            raise UserError(f"end {self.end:g} has no effect with kind 'constant'; kind 'cosine' falls to it")
        if self.start and not self.warmup:
            raise UserError(f"start {self.start:g} has no effect without warmup")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: which parts train, for how long, and how.

    train: parts by name. steps: optimiser steps. batch_size: samples a step over all processes. micro_batch_size:
    samples a forward pass of one process (None: all of its share). loss_weights: factor of each loss term
    ("flow.image", or "flow" for all tasks; "flow_4x4" for one scale of several); terms not named count 1. balance: how
    they become one loss.
    max_grad_norm: largest norm of the gradient. ema_decay: of the averaged weights, None for none. ema_warmup: as of
    `training.ema.EMA`.
    """

    name: str
    train: tuple[str, ...]
    steps: int
    batch_size: int
    micro_batch_size: int | None = None
    loss_weights: dict[str, NotNegative] = field(default_factory=dict[str, float])
    balance: Balance = "samples"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    max_grad_norm: Positive = 1.0
    ema_decay: float | None = None
    ema_warmup: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"stage {self.name!r}: {name} must be at least 1, not {getattr(self, name)}")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise UserError(f"stage {self.name!r}: micro_batch_size must be at least 1, not {self.micro_batch_size}")
        if self.max_grad_norm <= 0:
            raise UserError(f"stage {self.name!r}: max_grad_norm must be above 0, not {self.max_grad_norm}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(
                f"stage {self.name!r}: ema_decay must be between 0 and 1, not {self.ema_decay}; leave it out for none"
            )
        if self.ema_decay is None and not self.ema_warmup:
            raise UserError(f"stage {self.name!r}: ema_warmup has no effect without ema_decay")
        if not self.train:
            raise UserError(f"stage {self.name!r}: trains nothing; name parts under `train`")
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What does not change the result: when to log, save, validate and draw; how to run.

    save_every, validate_every, sample_every, score_every: steps, and at a stage's end; 0 for never, but a stage's end
    always saves. sample_clip: a CLIP model (folder or hub id) that scores the pictures of prompts that are drawn then.
    score_tasks, score_limit: what is scored then, with the averaged weights where there are any, and how
    many prompts of each task. keep_checkpoints: number of the last checkpoints that stay; keep_stages: the last one of
    every stage stays too. num_workers: data processes. precision: `fp32` or `bf16` (autocast). checkpointing: parts
    whose activations are recomputed. compile: of the decoder's blocks, see `training.regions`. strategy: `auto` (one
    process, or DDP when started by a launcher), `fsdp` (weights divided among all processes, which draws no pictures on
    the way) or `hsdp` (`replicas` copies of the weights, each divided among its own processes; as many processes as a
    machine has GPUs keep the gathering of weights inside it). frozen_weights: number format of what no stage trains;
    with `auto` that of a bfloat16 file where `precision` is bf16, else float32. What a stage trains is float32,
    whatever the file has. tensorboard, trackers: where metrics and pictures go besides the run folder
    (`training.metrics`).
    """

    log_every: int = 10
    save_every: int = 500
    validate_every: int = 500
    sample_every: int = 0
    sample_clip: str | None = None
    score_every: int = 0
    score_tasks: tuple[str, ...] = ("toyeval",)
    score_limit: int | None = None
    keep_checkpoints: int = 2
    keep_stages: bool = False
    num_workers: Annotated[int, Interval(ge=0, le=1024)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpointing: tuple[str, ...] = ()
    compile: Literal["off", "regional"] = "off"
    strategy: Literal["auto", "fsdp", "hsdp"] = "auto"
    replicas: Annotated[int, Interval(ge=2)] | None = None
    frozen_weights: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu"] = "auto"
    tensorboard: bool = True
    trackers: tuple[Tracker, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("log_every", 1), ("keep_checkpoints", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("save_every", "validate_every", "sample_every", "score_every"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0 (never), not {getattr(self, name)}")
        if self.score_limit is not None and self.score_limit < 1:
            raise UserError(f"score_limit must be at least 1, not {self.score_limit}; leave it out for all")
        if len(set(self.trackers)) < len(self.trackers):
            raise UserError(f"trackers names one twice: {', '.join(self.trackers)}")
        if self.sample_clip is not None and not self.sample_every:
            raise UserError("sample_clip scores pictures that are drawn, and sample_every is 0; set it to steps")
        if self.score_limit is not None and not self.score_every:
            raise UserError(f"score_limit {self.score_limit} has no effect with score_every 0, which scores never")
        if self.score_every and not self.score_tasks:
            raise UserError("score_every needs score_tasks")
        for name in ("sample_every", "score_every"):
            if self.sharded and getattr(self, name):
                raise UserError(
                    f"{name} must be 0 with strategy {self.strategy!r}: no process has the whole model to draw with"
                )
        if (self.strategy == "hsdp") != (self.replicas is not None):
            raise UserError("strategy 'hsdp' and replicas, the number of copies of the weights, go together")
        if self.frozen_weights == "bfloat16" and self.precision != "bf16":
            raise UserError("frozen_weights 'bfloat16' needs precision 'bf16', which computes with them")

    @property
    def sharded(self) -> bool:
        """Whether no process has all of the weights."""
        return self.strategy != "auto"
