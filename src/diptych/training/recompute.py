"""Activations that are recomputed in the backward pass instead of kept (Chen et al. 2016, arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from diptych.core.errors import UserError, unknown
from diptych.parts.backbones.causal import NothingKept
from diptych.systems.base import System

CACHE = "past_key_values"
"""The argument of a language model's layer that runs after a cached prompt. Running it again would add to the cache, so
that these runs, which are those of a few appended tokens, keep their activations."""


def recompute_activations(system: System, parts: Sequence[str]) -> None:
    """Recompute the activations of every block of the named parts, in place; results do not change.

    Of a block only its input is kept, so that a part of N blocks keeps about 1 / N of its activations and costs one
    more forward pass.

    Raises:
        UserError: a part that the system has not, or that has no blocks.
    """
    known = system.named_parts()
    for name in parts:
        if name not in known:
            raise unknown("part", name, known, "run.checkpointing")
        inside = {id(parameter) for parameter in known[name].parameters()}
        blocks = [unit for unit in system.shard_units() if any(id(p) in inside for p in unit.parameters())]
        if not blocks:
            raise UserError(f"run.checkpointing: part {name!r} has no blocks whose activations could be recomputed")
        recompute_blocks(blocks)


def recompute_blocks(blocks: Iterable[nn.Module]) -> None:
    """Recompute the activations of these modules, each by itself, in place."""
    for block in blocks:
        if not isinstance(block.forward, Recomputed):
            block.forward = Recomputed(block.forward)


class Recomputed:
    """The forward pass of a block that keeps its inputs alone."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or keeps_cache(kwargs):
            return self.forward(*args, **kwargs)
        # Backward passes leave the modes that change functions, such as `attention.WrittenOut`: they are entered again.
        modes = _get_current_function_mode_stack()
        contexts = lambda: (nullcontext(), entered(modes))  # noqa: E731
        return checkpoint(self.forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def keeps_cache(kwargs: Mapping[str, Any]) -> bool:
    """Whether a block that is called with these writes into a cache."""
    cache = kwargs.get(CACHE)
    return not (cache is None or isinstance(cache, NothingKept))


@contextmanager
def entered(contexts: Sequence[AbstractContextManager[object]]) -> Iterator[None]:
    """Inside all of these contexts."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
