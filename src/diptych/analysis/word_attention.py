"""How much of its attention to the prompt an image gives to objects, positions, colours and other words.

Source: Yu et al., Semantic Generative Tuning, App. 7.5 and Fig. 12. The noisy latents of an image ask, the tokens of
the prompt answer; a head's weights are the softmax over these tokens alone, as in the pseudocode, which asks the cached
prompt. They are averaged over latents, then heads, and summed over the tokens of a category; the first three steps of
sampling and all prompts are averaged. Shares of the four categories sum to 1; `other` holds all that is no keyword, and
so what goes to the template and to markers around the prompt, which `unworded` tells.

Where a decoder sees queries in place of the prompt (IOMM, MetaQuery), what it gives to a query goes to the tokens that
the query itself attends to in the MLLM and its adapter, averaged over layers and heads: a step that the paper does not
need, since BAGEL's latents see the prompt itself.

K condition tokens that the decoder sees, L tokens of the prompt, N latent tokens, H heads, G groups of heads that share
keys, W words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from diptych.analysis.watching import Attention, Watching
from diptych.analysis.words import CATEGORIES, Prompt, places
from diptych.core.condition import Condition, TokenCondition
from diptych.core.condition import ScaleConditions as Scales
from diptych.core.draws import Draws, key
from diptych.core.errors import UserError
from diptych.core.sample import Batch, Sample
from diptych.inference.engine import Engine
from diptych.inference.guidance import Branch
from diptych.inference.scales import View, views
from diptych.parts.backbones.internvl import InternVL
from diptych.parts.backbones.ovis import Ovis
from diptych.parts.backbones.qwen2_5_vl import Qwen2_5VL
from diptych.parts.conditioners.hierarchical_queries import HierarchicalQueries
from diptych.parts.decoders.zimage import ZImage
from diptych.systems.bagel.context import CacheCondition
from diptych.systems.bagel.system import BagelSystem
from diptych.systems.base import AssembledSystem, System
from diptych.systems.composed import ComposedSystem
from diptych.systems.presets import HieraConfig

STEPS = 3
"""Of sampling, the first ones (App. 7.5)."""


@dataclass(frozen=True)
class Request:
    """A prompt as the decoder meets it. ids: (L) tokens. spread: (K, L), which tokens of the prompt each condition
    token stands for; rows sum to at most 1."""

    condition: Condition
    ids: list[int]
    spread: Tensor


@dataclass
class WordAttention:
    """What one prompt got. tokens: (L) pieces of text. owners: the word of each. share: by layer and group of heads,
    (layers, G, L), mean of the steps; each (layer, group) sums to 1 with what no token of the prompt stands for.
    steps: the same by step, mean of layers and groups, (steps, L). text: share of all attention, that to latents
    included, that goes to the condition, by layer."""

    prompt: Prompt
    tokens: list[str]
    owners: list[int | None]
    share: Tensor
    steps: Tensor
    text: list[float] = field(default_factory=list[float])

    def words(self) -> list[float]:
        """Share of each word of the prompt, (W)."""
        total = self.share.mean((0, 1))  # (L,)
        return [
            float(sum((total[at] for at, owner in enumerate(self.owners) if owner == number), torch.zeros(())))
            for number in range(len(self.prompt.words))
        ]

    def categories(self, share: Tensor) -> dict[str, float]:
        """Shares (L,) of tokens summed by category; they sum to 1."""
        shares: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0)
        for value, owner in zip(share.tolist(), self.owners, strict=True):
            if owner is not None:
                shares[self.prompt.words[owner].category] += value
        shares["other"] = 1.0 - sum(shares[name] for name in CATEGORIES if name != "other")
        return shares

    def unworded(self, share: Tensor) -> float:
        """What goes to no word of the prompt."""
        return 1.0 - sum(value for value, at in zip(share.tolist(), self.owners, strict=True) if at is not None)


def prompt_shares(weights: Tensor, spread: Tensor) -> Tensor:
    """A head's attention to the tokens of the prompt, mean over latents: (N, K), (K, L) to (L,).

    Weights to the condition are normalised query by query first, which is their softmax over the condition alone.
    """
    alone = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return alone.mean(0) @ spread


@torch.no_grad()
def attend(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    steps: int = STEPS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[WordAttention]:
    """Attention to each prompt over the first steps of sampling one image, guided by text as the model's defaults say.

    Raises:
        UserError: a model that makes no images, or whose decoder does not put the prompt before the image.
    """
    system = engine.system
    if not isinstance(system, AssembledSystem) or "text_to_image" not in system.tasks:
        raise UserError(f"{engine.name}: makes no images from text, so no words to attend to")
    if isinstance(system.decoder, ZImage):
        raise UserError(f"{engine.name}: Z-Image pads image and text together; its words cannot be told apart")
    [view] = views(system, engine.sampling.size, "last")
    total = len(engine.plan(view, engine.sampling)[0].times)
    if not 1 <= steps <= total:
        raise UserError(f"steps must be from 1 to the model's {total}, not {steps}")
    results: list[WordAttention] = []
    for number, prompt in enumerate(prompts):
        results.append(_one(engine, system, view, prompt, steps, key(seed, number, 0)))
        if progress is not None:
            progress(number + 1, len(prompts))
    return results


def _one(engine: Engine, system: AssembledSystem, view: View, prompt: Prompt, steps: int, noise: int) -> WordAttention:
    sampling = engine.sampling
    sample = Sample(id=f"prompt {prompt.text!r}", task="text_to_image", text=prompt.text, size=sampling.size)
    batch = Batch((sample,)).to(system.device)
    request = read(system, batch)
    # The model's own solver and guidance; what the prompt gets is measured in the branch that has it.
    solver, guidance = engine.plan(view, sampling)
    others: dict[Branch, Condition] = {
        branch: view.of(system.encode(engine.version(branch, batch, sampling.negative)))
        for branch in guidance.branches(batch)
        if branch != "full"
    }
    latents = view.shape[1] * view.shape[2] // _side(system) ** 2
    by_step: list[Tensor] = []
    texts: list[list[float]] = []
    made: list[int] = []
    walk = solver.walk(
        Draws([noise], system.device).normal(view.noise, *view.shape), lambda step: made.append(step.number)
    )
    x, now = next(walk)
    while True:
        rows: list[Tensor] = []
        masses: list[float] = []

        def attended(call: Attention, rows: list[Tensor] = rows, masses: list[float] = masses) -> None:
            measured = layer(call, latents, request.spread)
            if measured is not None:
                rows.append(measured[0])
                masses.append(measured[1])

        at = torch.full((1,), now, device=system.device)
        with Watching(attended):
            v = system.velocity(x, at, request.condition)
        if not rows:
            raise UserError(f"{engine.name}: no attention of the image to the prompt was found in its decoder")
        if len(by_step) == len(made):  # a solver may ask again within a step
            by_step.append(torch.stack(rows).cpu())  # (layers, G, L)
            texts.append(masses)
        if others and guidance.acts(now):
            velocities: dict[Branch, Tensor] = {name: system.velocity(x, at, other) for name, other in others.items()}
            velocities["full"] = v
            v = guidance.combine(velocities, now)
        try:
            x, now = walk.send(v)
        except StopIteration:
            break
        if len(made) == steps:
            break
    share = torch.stack(by_step)  # (steps, layers, G, L)
    tokenizer = tokenizer_of(system)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return WordAttention(
        prompt=prompt,
        tokens=[decode([id]) for id in request.ids],
        owners=places(request.ids, decode, prompt),
        share=share.mean(0),
        steps=share.mean((1, 2)),
        text=torch.tensor(texts).mean(0).tolist(),
    )


def layer(call: Attention, latents: int, spread: Tensor) -> tuple[Tensor, float] | None:
    """What one attention of a decoder gives to the prompt, by group of heads (G, L), and the share of all its weight
    that goes to the condition; None for one that does not join image and condition.

    The condition's tokens come first among the keys, the image's last among the queries; BAGEL's two image markers
    stand between. A decoder with cross-attention has the condition's keys alone.

    Args:
        latents: N. spread: (K, L).
    """
    count = spread.shape[0]
    if call.query.shape[0] != 1 or call.queries < latents or call.keys - count not in (0, latents, latents + 2):
        return None
    if call.keys == count and call.queries != latents:
        return None
    shares: list[Tensor] = []
    masses: list[float] = []
    for head in range(call.heads):
        weights = call.weights(head, call.queries - latents)[0, :, :count]  # (N, K)
        shares.append(prompt_shares(weights, spread.to(weights.device)))
        masses.append(float(weights.sum(-1).mean()))
    groups = torch.stack(shares).unflatten(0, (call.groups, -1)).mean(1)  # (G, L)
    return groups, sum(masses) / len(masses)


def read(system: AssembledSystem, batch: Batch) -> Request:
    """A request's condition, the tokens behind it, and what each condition token stands for."""
    looked_up: list[tuple[int, Tensor]] = []
    calls: list[Attention] = []
    if isinstance(system, BagelSystem):
        system.store.entries.clear()  # what was read before would not be looked up again
    with Watching(calls.append, lambda ids, size: looked_up.append((size, ids))):
        whole = system.encode(batch)
    texts = [ids.flatten().tolist() for size, ids in looked_up if size == max(size for size, _ in looked_up)]
    ids: list[int] = texts[0] if texts else []
    if not ids:
        raise UserError(f"{batch.samples[0].id}: no text was read")
    condition = _last(whole)
    if isinstance(condition, CacheCondition):
        return Request(condition, ids, torch.eye(condition.length))
    assert isinstance(condition, TokenCondition)
    length, count = len(ids), condition.tokens.shape[1]
    assert isinstance(system, ComposedSystem)
    options, conditioner, queries = system.options, system.conditioner, system.conditioner.count
    if isinstance(options, HieraConfig) and isinstance(conditioner, HierarchicalQueries):
        reading = query_reading(calls, queries, length)
        scales = [scale[0] for scale in conditioner.split(reading[None])]  # (N_k, L) each, markers left out
        spread = torch.cat(scales) if options.scale_condition == "cumulative" else scales[-1]
        return Request(condition, ids, spread)
    if queries or options.condition == "queries":
        skip = options.prompt_skip
        kept = min(queries, count)
        spread = torch.zeros(count, length)
        if options.condition == "all" and count > kept:
            spread[: length - skip] = torch.eye(length)[skip:]
        if kept:
            spread[count - kept :] = query_reading(calls, queries, length)[-kept:]
        return Request(condition, ids, spread)
    spread = torch.zeros(count, length)
    spread[count - length :] = torch.eye(length)  # Ovis-U1's first token is one of its refiner
    return Request(condition, ids, spread)


def query_reading(calls: Sequence[Attention], queries: int, length: int) -> Tensor:
    """Which tokens of the prompt each query attends to, (Q, L): mean of all layers and heads in which queries ask."""
    readings: list[Tensor] = []
    for call in calls:
        asks = call.queries in (queries, length + queries) and call.keys in (length, length + queries)
        if not asks or call.query.shape[0] != 1 or call.queries > call.keys:
            continue
        for head in range(call.heads):
            weights = call.weights(head, call.queries - queries)[0, :, :length]  # (Q, L)
            readings.append(weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny))
    if not readings:
        raise UserError("no attention of the queries to the prompt was found")
    return torch.stack(readings).mean(0).cpu()


def _last(condition: Condition) -> Condition:
    """The condition of the image itself, of several scales the last."""
    return condition.scales[-1] if isinstance(condition, Scales) else condition


def _side(system: AssembledSystem) -> int:
    """Side of a latent token in latent pixels."""
    return system.token_side if isinstance(system, BagelSystem) else system.decoder.patch


def tokenizer_of(system: System) -> PreTrainedTokenizerBase:
    """The tokenizer of a system's language model."""
    if isinstance(system, BagelSystem) and system.tokenizer is not None:
        return system.tokenizer
    backbone = system.backbone if isinstance(system, AssembledSystem) and not isinstance(system, BagelSystem) else None
    if isinstance(backbone, InternVL | Qwen2_5VL | Ovis):
        return backbone.tokenizer
    raise UserError("this system's language model has no tokenizer that words could be found with")


def summary(results: Sequence[WordAttention]) -> dict[str, Any]:
    """Shares by category: overall with their deviation over the prompts, by layer, by layer and group of heads, and by
    step; and by word of each prompt."""

    def mean(pick: Callable[[WordAttention], Tensor]) -> dict[str, float]:
        rows = [result.categories(pick(result)) for result in results]
        return {name: sum(row[name] for row in rows) / len(rows) for name in CATEGORIES}

    layers, groups = results[0].share.shape[:2]
    each = [result.categories(result.share.mean((0, 1))) for result in results]
    spread = {name: float(torch.tensor([row[name] for row in each]).std(correction=0)) for name in CATEGORIES}
    return {
        "prompts": len(results),
        "steps": len(results[0].steps),
        "overall": mean(lambda result: result.share.mean((0, 1))),
        "deviation": spread,
        "unworded": sum(result.unworded(result.share.mean((0, 1))) for result in results) / len(results),
        "by_layer": [mean(lambda result, at=at: result.share[at].mean(0)) for at in range(layers)],
        "by_group": [
            [mean(lambda result, at=at, group=group: result.share[at, group]) for group in range(groups)]
            for at in range(layers)
        ],
        "by_step": [mean(lambda result, at=at: result.steps[at]) for at in range(len(results[0].steps))],
        "text_by_layer": [sum(result.text[at] for result in results) / len(results) for at in range(layers)],
        "words": [
            {
                "prompt": result.prompt.text,
                "words": [
                    {"word": word.text, "category": word.category, "share": share}
                    for word, share in zip(result.prompt.words, result.words(), strict=True)
                ],
            }
            for result in results
        ],
    }
