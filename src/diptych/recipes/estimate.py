"""What a training step of a recipe will cost in memory, from a trace that takes none.

A sharded run is traced in a simulated world: the system is sharded by the code that will shard it, over processes that
are not there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.prepared import Prepared, PreparedBatch, map_tensors
from diptych.core.sample import Task
from diptych.recipes.distilling import calls_of, teaching
from diptych.recipes.load import quantize_frozen
from diptych.recipes.quantized_stand_in import QuantizedStandIn
from diptych.recipes.recipe import Recipe, StageSpec
from diptych.recipes.stand_in import ANSWER_TOKENS, PROMPT_TOKENS, lend_tokenizer, stand_in_samples, task_counts
from diptych.systems.base import System
from diptych.systems.composed import ComposedSystem
from diptych.training.attention import WrittenOut
from diptych.training.config import StageConfig
from diptych.training.cuda_autocast import CudaAutocast
from diptych.training.flops import FlopCounter
from diptych.training.memory import AllocationTracker, StepMemory, trace_step, without_memory
from diptych.training.optimizers import trainable
from diptych.training.parallel import shard
from diptych.training.recompute import recompute_activations
from diptych.training.repeated_blocks import RepeatedBlocks
from diptych.training.simulated import SimulatedProcess, simulated_world

RULE = (
    f"traced: passes and an optimiser step on tensors without memory, where a text counts as {PROMPT_TOKENS} tokens "
    f"and an answer as {ANSWER_TOKENS}"
)


DIFFERENT = 4
"""Samples of a task that are prepared; what is dropped for guidance differs among them."""


class NothingLearnsError(Exception):
    """The losses of a stage depend on nothing that it trains."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process at the worst moment of a step.

    weights, gradients, optimizer, ema: of this process's share where the run is sharded. gathered: whole weights of the
    units that a sharded process puts together, at that moment. buckets: gradients once more, as DDP sends them.
    teacher: weights that a stage of kind distill keeps of the start.
    activations: all else; None where the system takes no samples such as a trace needs.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int | None
    gathered: int = 0
    buckets: int = 0
    teacher: int = 0

    @property
    def total(self) -> int:
        parts = (
            self.weights, self.gradients, self.optimizer, self.ema, self.gathered, self.buckets, self.teacher,
        )  # fmt: skip
        return sum(parts) + (self.activations or 0)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a sample takes, on average over a stage's tasks.

    tokens: latent and text tokens that are predicted. flops: floating-point operations forward and backward
    (`training.flops`), where the texts are as long as a trace takes them to be; each run of a teacher counts as a
    forward pass without the MLLM. latents, states: those of them that prepared latents and states would save.
    """

    tokens: float
    flops: float
    latents: float = 0.0
    states: float = 0.0

    def saved(self, kinds: Sequence[str]) -> float:
        """Operations that what is prepared saves."""
        return sum({"latents": self.latents, "states": self.states}.get(kind, 0.0) for kind in kinds)


@contextmanager
def kept_apart(system: System, counter: FlopCounter) -> Iterator[dict[str, float]]:
    """Meanwhile, what making targets' latents and the MLLM's states takes of what `counter` counts."""
    kept = {"latents": 0.0, "states": 0.0}
    methods = {"latents": "target_latents", "states": "read"} if isinstance(system, ComposedSystem) else {}

    def counted(kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            before = counter.total
            result = method(*args)
            kept[kind] += counter.total - before
            return result

        return call

    for kind, name in methods.items():
        setattr(system, name, counted(kind, getattr(system, name)))
    try:
        yield kept
    finally:
        for name in methods.values():
            delattr(system, name)


def world_of(recipe: Recipe, processes: int) -> AbstractContextManager[None]:
    """The world in which a recipe's memory is traced."""
    return simulated_world(processes) if sharded(recipe, processes) else nullcontext()


def sharded(recipe: Recipe, processes: int) -> bool:
    return recipe.run.sharded and processes > 1


class MemoryPlan:
    """The memory of the stages of a recipe. `system` is on the meta device; its weights become fake ones, and shards of
    such in a sharded run, so that `world_of` has to be entered before."""

    def __init__(self, system: System, recipe: Recipe, processes: int = 1, *, merge: bool = True) -> None:
        """merge: of `RepeatedBlocks`."""
        self.system, self.recipe, self.processes = system, recipe, processes
        self.sharded = sharded(recipe, processes)
        self.half = recipe.run.precision == "bf16"
        lend_tokenizer(system)
        widened = torch.bfloat16 if recipe.run.frozen_weights == "bfloat16" else torch.float32
        quantize_frozen(system, recipe, functools.partial(QuantizedStandIn, widened=widened))
        recompute_activations(system, recipe.run.checkpointing)
        muon = any(stage.optimizer.kind == "muon" for stage in recipe.stages.values())  # which takes matrices
        blocks = list(system.shard_units())
        self.repeated = RepeatedBlocks(
            blocks, system.named_parts(), merge=merge and not muon and not self._copies(blocks)
        )
        without_memory(system, self._formats())
        if self.sharded:
            process = SimulatedProcess(num_processes=processes, mixed_precision="bf16" if self.half else "no")
            shard(system, process, recipe.run)

    def _formats(self) -> Callable[[str], torch.dtype]:
        """The number format of each weight. What no stage trains counts as float32 where the run leaves it to the
        files, which are not read here; quantised weights are bytes."""
        parts = self.system.named_parts()
        names = {name for stage in self.recipe.stages.values() for name in stage.train}
        trained = {id(p) for name in names for p in parts[name].parameters()}
        learn = {name for name, parameter in self.system.named_parameters() if id(parameter) in trained}
        half = self.recipe.run.frozen_weights == "bfloat16"
        bytes_ = {name: p.dtype for name, p in self.system.named_parameters() if not p.is_floating_point()}
        return lambda name: bytes_.get(name, torch.bfloat16 if half and name not in learn else torch.float32)

    def stage(self, name: str, spec: StageSpec) -> tuple[Memory, Work | None]:
        """Of a stage whose trained parts are unfrozen and whose options are set; no `Work` where it is not traced."""
        batches, flops = self._batches(spec), list[dict[str, float]]()
        with suppress(NothingLearnsError):  # which the look at the data says, with its reason
            step = self._traced(name, spec, batches, flops) if batches else None
            if step is not None:
                memory = Memory(
                    weights=step.weights,
                    gradients=step.gradients,
                    optimizer=step.optimizer,
                    ema=step.ema,
                    activations=step.activations,
                    gathered=step.gathered,
                    buckets=step.gradients if self.processes > 1 and not self.sharded else 0,
                    teacher=self._teacher(spec),
                )
                return memory, self._work(spec, batches, flops)
        learned = list(trainable(self.system).values())
        count = sum(parameter.numel() for parameter in learned)
        inside = {id(p) for block in self.system.shard_units() for p in block.parameters() if p.ndim == 2}
        muon = sum(p.numel() for p in learned if spec.optimizer.kind == "muon" and id(p) in inside)
        share = self.processes // (self.recipe.run.replicas or 1) if self.sharded else 1
        memory = Memory(
            weights=sum(parameter.nbytes for parameter in self.system.parameters()) // share,
            gradients=4 * count // share,
            optimizer=((2 if spec.optimizer.kind == "adamw8bit" else 8) * (count - muon) + 4 * muon) // share,
            ema=4 * count // share if spec.ema_decay else 0,
            activations=None,
            buckets=4 * count if self.processes > 1 and not self.sharded else 0,
            teacher=self._teacher(spec),
        )
        return memory, None

    def _teacher(self, spec: StageSpec) -> int:
        """Bytes of the weights that a teacher keeps: of all that any stage trains, in float32; of new adapters none."""
        parts = self.system.named_parts()
        names = {name for stage in self.recipe.stages.values() for name in stage.train}
        if spec.kind != "distill" or names == {"lora"}:
            return 0
        return 4 * sum(p.numel() for p in {p for name in names for p in parts[name].parameters()})

    def _work(self, spec: StageSpec, batches: list[PreparedBatch], flops: list[dict[str, float]]) -> Work:
        """A sample's share of the passes that were traced, each task counted by its sources' weights.

        A process of a sharded run borrows samples of tasks that it has none of: what these take belongs to its own.
        """
        weights: dict[str, float] = {}
        for source in spec.data.sources.values():
            weights[source.task] = weights.get(source.task, 0.0) + source.weight
        shares = {task: weight / sum(weights.values()) for task, weight in weights.items()}
        tokens: dict[str, float] = {}
        for batch in batches:
            for term, counts in batch.counts.items():
                family, _, task = term.rpartition(".")
                if not family.startswith("align"):  # a second term on the tokens of the first
                    tokens[term] = sum(counts) / len(counts) * shares[task]
        rest = sum(shares[task] for batch in batches[1:] for task in set(batch.tasks))
        scales = [(1 - rest) / self._pass_size(spec), *(shares[batch.tasks[0]] / len(batch) for batch in batches[1:])]

        def each(kind: str) -> float:
            return sum(counts[kind] * scale for counts, scale in zip(flops, scales, strict=True))

        return Work(tokens=sum(tokens.values()), flops=each("all"), latents=each("latents"), states=each("states"))

    def _traced(
        self, name: str, spec: StageSpec, batches: list[PreparedBatch], flops: list[dict[str, float]]
    ) -> StepMemory:
        """flops: gets those of each batch."""
        inputs: list[Tensor] = []
        for batch in batches:
            map_tensors(batch.inputs, inputs.append)
        config = StageConfig(
            name=name,
            train=spec.train,
            steps=1,
            batch_size=1,
            optimizer=spec.optimizer,
            ema_decay=spec.ema_decay,
            ema_warmup=spec.ema_warmup,
        )
        blocks = list(self.system.shard_units())
        tracker, counter = AllocationTracker(), FlopCounter()
        repeated = nullcontext() if self._copies(blocks) else self.repeated.passed_over(tracker, counter)
        with self._kernels(), repeated:
            return trace_step(
                self.system,
                config,
                [self._forward(batch, counter, flops, self._calls(spec, batch)) for batch in batches],
                blocks=blocks,
                inputs=inputs,
                accumulates=self._passes(spec) > len(batches),
                tracker=tracker,
            )

    def _copies(self, blocks: Sequence[nn.Module]) -> bool:
        """Whether autocast keeps copies of whole weights that learn until the forward pass ends: such blocks are traced
        one by one."""
        parts = self.system.named_parts()
        names = {name for stage in self.recipe.stages.values() for name in stage.train if name != "lora"}
        learning = {id(p) for name in names for p in parts[name].parameters()}
        inside = any(id(p) in learning for block in blocks for p in block.parameters())
        return self.half and not self.sharded and inside

    def _kernels(self) -> AbstractContextManager[object]:
        """What the run's device computes otherwise than a trace on the CPU does."""
        if not self.half:
            return nullcontext()
        return WrittenOut() if self.recipe.run.device == "cpu" else CudaAutocast()

    def _calls(self, spec: StageSpec, batch: PreparedBatch) -> float:
        """Runs of the network by which a teacher draws a sample, on average over a batch; 0 without a teacher."""
        if spec.kind != "distill":
            return 0.0
        settings = teaching(self.recipe, spec)
        counts = [calls_of(settings.edit if task == "edit" else settings.draw, task) for task in batch.tasks]
        return sum(counts) / len(counts)

    def _forward(
        self, batch: PreparedBatch, counter: FlopCounter, flops: list[dict[str, float]], calls: float
    ) -> Callable[[], Tensor]:
        """calls: further forward passes, without gradients, that a teacher takes before."""

        def losses() -> tuple[dict[str, Tensor], dict[str, float]]:
            before = counter.total
            with (
                counter,
                kept_apart(self.system, counter) as kept,
                torch.autocast("cpu", torch.bfloat16, enabled=self.half),
            ):
                terms = self.system.losses(batch, Draws(list(range(len(batch))), "cpu"))
            return terms, {"all": counter.total - before, **kept}

        def forward() -> Tensor:
            teacher: dict[str, float] = {}
            if calls:
                with torch.no_grad():
                    teacher = losses()[1]
            terms, counts = losses()
            if calls:  # the MLLM reads a request once, and nothing prepared is used
                decoder = teacher["all"] - teacher["latents"] - teacher["states"]
                counts = {"all": counts["all"] + calls * decoder, "latents": 0.0, "states": 0.0}
            flops.append(counts)
            loss = torch.stack([values.float().sum() for values in terms.values()]).sum()
            if not loss.requires_grad:
                raise NothingLearnsError
            return loss

        return forward

    def _batches(self, spec: StageSpec) -> list[PreparedBatch]:
        """Of one step of one process the pass that most of its passes are like, and those that add a task.

        In a sharded run every process runs the tasks of all: those that its samples are not of, it borrows.
        """
        count = self._pass_size(spec)
        mixed = task_counts(spec, count)
        missing: list[Task] = [task for task, number in mixed.items() if not number]
        if self.sharded and not self.system.runs_every_unit:
            wanted = [mixed | dict.fromkeys(missing, 1)]
        else:
            wanted = [mixed, *({task: count} for task in missing)]
        made = [self._prepared(spec, counts) for counts in wanted[: self._passes(spec)]]
        return [batch for batch in made if batch is not None]

    def _pass_size(self, spec: StageSpec) -> int:
        """Samples of a pass of one process."""
        local = -(-spec.batch_size // self.processes)
        return min(spec.micro_batch_size or local, local)

    def _passes(self, spec: StageSpec) -> int:
        """Passes of a step of one process."""
        return -(-spec.batch_size // self.processes // self._pass_size(spec))

    def _prepared(self, spec: StageSpec, counts: dict[Task, int]) -> PreparedBatch | None:
        """Samples as a loader's workers prepare them, with texts as long as the system's context allows; None where it
        reads no image of the stage's size at all."""
        preparer = self.system.preparer()
        for length in (1.0, 0.25, 0.0625, 0.0):
            samples = stand_in_samples(spec, counts, length)
            made: dict[tuple[Task, int], Prepared] = {}  # some of each task, over and over
            with suppress(UserError):
                for row, sample in enumerate(samples):
                    if (sample.task, row % DIFFERENT) not in made:
                        made[sample.task, row % DIFFERENT] = preparer.prepare(sample, Draws([row], "cpu"))
                return preparer.collate([made[x.task, row % DIFFERENT] for row, x in enumerate(samples)])
        return None
