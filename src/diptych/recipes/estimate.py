"""What a training step of a recipe will cost in memory, from a trace that takes none."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.prepared import PreparedBatch
from diptych.recipes.recipe import Recipe, StageSpec
from diptych.recipes.stand_in import ANSWER_TOKENS, PROMPT_TOKENS, lend_tokenizer, stand_in_batch
from diptych.systems.base import System
from diptych.training.config import StageConfig
from diptych.training.memory import trace_step, without_memory
from diptych.training.optimizers import trainable
from diptych.training.recompute import recompute_activations

RULE = (
    f"activations are traced: a forward and a backward pass on tensors without memory, where a text counts as "
    f"{PROMPT_TOKENS} tokens and an answer as {ANSWER_TOKENS}"
)


class NothingLearnsError(Exception):
    """The losses of a stage depend on nothing that it trains."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process at the worst moment of a step.

    weights, gradients, optimizer, ema: of this process's share where the run is sharded. gathered: whole weights and
    gradients of the units that a sharded process puts together while they run. activations: all else; None where the
    system takes no samples such as a trace needs.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int | None
    gathered: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema + (self.activations or 0) + self.gathered


class MemoryPlan:
    """The memory of the stages of a recipe. `system` is on the meta device; its weights become fake ones."""

    def __init__(self, system: System, recipe: Recipe, processes: int = 1) -> None:
        self.system, self.recipe, self.processes = system, recipe, processes
        self.sharded = recipe.run.strategy == "fsdp" and processes > 1
        self.half = recipe.run.precision == "bf16"
        lend_tokenizer(system)
        recompute_activations(system, recipe.run.checkpointing)
        # A sharded process gathers weights in the format that it computes in; autocast keeps them in float32 and makes
        # copies, which the trace counts as activations.
        without_memory(system, lambda name: torch.bfloat16 if self.sharded and self.half else torch.float32)

    def stage(self, name: str, spec: StageSpec) -> Memory:
        """Of a stage whose trained parts are unfrozen and whose options are set."""
        learned = list(trainable(self.system).values())
        count = sum(parameter.numel() for parameter in learned)
        inside = {id(p) for block in self.system.shard_units() for p in block.parameters() if p.ndim == 2}
        muon = sum(p.numel() for p in learned if spec.optimizer.kind == "muon" and id(p) in inside)
        share = self.processes if self.sharded else 1
        return Memory(
            weights=4 * sum(parameter.numel() for parameter in self.system.parameters()) // share,
            gradients=4 * count // share,
            optimizer=(8 * (count - muon) + 4 * muon) // share,
            ema=4 * count // share if spec.ema_decay else 0,
            activations=self._activations(name, spec),
            gathered=self._gathered() if self.sharded else 0,
        )

    def _activations(self, name: str, spec: StageSpec) -> int | None:
        own = -(-spec.batch_size // self.processes)  # samples of a step on one process
        count = min(spec.micro_batch_size or own, own)
        prepared = self._prepared(spec, count)
        if prepared is None:
            return None
        keys = list(range(count))

        def forward() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
                terms = self.system.losses(prepared, Draws(keys, "cpu"))
            loss = torch.stack([values.float().sum() for values in terms.values()]).sum()
            if not loss.requires_grad:
                raise NothingLearnsError
            return loss

        config = StageConfig(name=name, train=spec.train, steps=1, batch_size=1, optimizer=spec.optimizer)
        with suppress(NothingLearnsError):  # which the look at the data says, with its reason
            return trace_step(self.system, config, forward, blocks=list(self.system.shard_units())).activations
        return None

    def _prepared(self, spec: StageSpec, count: int) -> PreparedBatch | None:
        """Samples as a loader's workers prepare them, with texts as long as the system's context allows; None where it
        reads no image of the stage's size at all."""
        preparer = self.system.preparer()
        draws = Draws(list(range(count)), "cpu")
        for length in (1.0, 0.25, 0.0625, 0.0):
            batch = stand_in_batch(spec, count, length)
            with suppress(UserError):
                return preparer.collate([preparer.prepare(x, draws.take([row])) for row, x in enumerate(batch)])
        return None

    def _gathered(self) -> int:
        """FSDP2 keeps what is in no unit whole during a step, and two units: the one that runs and the next one."""
        width = 2 if self.half else 4
        units = list(self.system.shard_units())
        inside = {id(p) for unit in units for p in unit.parameters()}
        sizes = [sum(p.numel() for p in unit.parameters()) for unit in units]
        learning = [sum(p.numel() for p in unit.parameters() if p.requires_grad) for unit in units]
        outside = [p for p in self.system.parameters() if id(p) not in inside]
        weights = sum(p.numel() for p in outside) + 2 * max(sizes, default=0)
        gradients = sum(p.numel() for p in outside if p.requires_grad) + max(learning, default=0)
        return width * weights + 4 * gradients
