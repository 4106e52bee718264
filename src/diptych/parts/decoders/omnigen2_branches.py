"""OmniGen2 under several conditions at once: what guidance's branches have in common is computed once.

In the refiners an image sees only itself. The shift of its positions is the same for all of its tokens there, so it
turns queries and keys alike and cancels: the refined tokens of the noise, and those of a reference image, are the same
in every branch. Each branch's joint sequence runs without the padding that another one would need, with the image to
make first, so that the last block computes no other tokens.

B requests, N tokens of the image to make, R of a reference image, W hidden width, T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from diptych.core.condition import TokenCondition
from diptych.core.patchify import unpatchify
from diptych.parts.decoders.branches import DecoderBranches, cheapest, cost_of
from diptych.parts.decoders.omnigen2 import OmniGen2
from diptych.parts.decoders.omnigen2_layout import real


@dataclass(frozen=True)
class Sequences:
    """Joint sequences that run as one batch, [image to make, text, reference images], padded behind.

    places: (branch among the wanted, request) of each. texts: its text tokens, (L, W). images: which of the reference
    images it has. turns: (rows, T, K / 2). mask: (rows, 1, 1, T), None where nothing is padded.
    """

    places: list[tuple[int, int]]
    texts: list[Tensor]
    images: list[list[int]]
    turns: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Plan:
    """How the wanted branches run: turns of the noise alone, (B, N, K / 2), the reference images that are read, in
    batches by size, and the joint sequences."""

    noise: Tensor
    images: list[list[int]]
    groups: list[Sequences]


class OmniGen2Branches(DecoderBranches):
    """See the module's docstring. `conditions` are those of `OmniGen2.refine`."""

    def __init__(self, decoder: OmniGen2, conditions: Sequence[TokenCondition]) -> None:
        self.decoder, self.conditions = decoder, conditions
        self.lengths = [condition.lengths() for condition in conditions]
        self.owners: list[int] = []  # of each unlike reference image: its request
        self.embedded: list[Tensor] = []  # and its tokens before the refiner, (R, W)
        self.turns: dict[int, Tensor] = {}  # and its positions' turns, (R, K / 2)
        self.used = [self._references(condition) for condition in conditions]
        self.plans: dict[tuple[tuple[int, ...], torch.Size], Plan] = {}

    def _references(self, condition: TokenCondition) -> list[list[int]]:
        """Numbers of each request's reference images; one that an earlier branch has at the same place keeps its."""
        decoder = self.decoder
        rows: list[list[int]] = []
        for request, latents in enumerate(condition.context_latents or ((),) * condition.batch_size):
            numbers: list[int] = []
            for place, latent in enumerate(latents):
                tokens = decoder.ref_image_patch_embedder(decoder.image_tokens([latent]))[0]
                tokens = tokens + decoder.image_index_embedding[place]
                same = (
                    number
                    for number, (owner, other) in enumerate(zip(self.owners, self.embedded, strict=True))
                    if owner == request and other.shape == tokens.shape and torch.equal(other, tokens)
                )
                number = next(same, len(self.owners))
                if number == len(self.owners):
                    self.owners.append(request)
                    self.embedded.append(tokens)
                numbers.append(number)
            rows.append(numbers)
        return rows

    def __call__(self, x: Tensor, t: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        decoder = self.decoder
        key = (tuple(wanted), x.shape)
        if key not in self.plans:
            self.plans[key] = self._plan(x, wanted)
        plan = self.plans[key]
        time = decoder.time_vector(t)  # (B, 1, E)

        # The noise and the reference images by themselves, whatever the branch.
        noise = run(decoder.noise_refiner, decoder.x_embedder(decoder.image_tokens(list(x))), plan.noise, time)
        refined: dict[int, Tensor] = {}
        for numbers in plan.images:
            images = torch.stack([self.embedded[number] for number in numbers])  # (n, R, W)
            turns = torch.stack([self.turns[number] for number in numbers])
            owners = [self.owners[number] for number in numbers]
            made = run(decoder.ref_image_refiner, images, turns, time[owners])
            refined |= dict(zip(numbers, made.unbind(), strict=True))

        # The joint sequences of each branch.
        outputs: list[list[Tensor]] = [[x[:0]] * len(x) for _ in wanted]
        count, (rows, columns) = noise.shape[1], (side // decoder.patch for side in x.shape[-2:])
        for group in plan.groups:
            requests = [request for _, request in group.places]
            joint = pad_sequence(
                [
                    torch.cat([noise[request], text, *(refined[number] for number in images)])
                    for request, text, images in zip(requests, group.texts, group.images, strict=True)
                ],
                batch_first=True,
            )  # (rows, T, W)
            times = time[requests]
            joint = run(decoder.layers, joint, group.turns, times, group.mask, first=count)
            out = decoder.norm_out(joint[:, :count], times)  # (rows, N, C patch^2)
            made = -unpatchify(out, decoder.patch, "pqc", rows, columns).to(x.dtype)
            for (branch, request), velocity in zip(group.places, made, strict=True):
                outputs[branch][request] = velocity
        return [torch.stack(velocities) for velocities in outputs]

    def _plan(self, x: Tensor, wanted: Sequence[int]) -> Plan:
        decoder, noise = self.decoder, {}
        places: list[tuple[int, int]] = []
        texts: list[Tensor] = []
        images: list[list[int]] = []
        turns: list[Tensor] = []
        # Rows of all branches: the request's text, its references, and the noise last in rotary positions.
        for branch, number in enumerate(wanted):
            condition = self.conditions[number]
            layout = decoder.layout(list(x), condition)
            for request, (turn, sizes) in enumerate(zip(decoder.turns(layout, x.device), layout.sizes, strict=True)):
                text, *references, target = turn.split(sizes)
                used = self.used[number][request]
                noise.setdefault(request, target)
                for image, counts in zip(used, references, strict=True):
                    self.turns.setdefault(image, counts)
                places.append((branch, request))
                texts.append(condition.tokens[request, : sizes[0]])
                images.append(used)
                turns.append(torch.cat([target, text, *references]))
        # Rows that cost the least together share a batch.
        count = len(next(iter(noise.values())))
        lengths = [(len(turn) - count,) for turn in turns]
        groups = [
            Sequences(
                places=[places[k] for k in group],
                texts=[texts[k] for k in group],
                images=[images[k] for k in group],
                turns=pad_sequence([turns[k] for k in group], batch_first=True),
                mask=padding([len(turns[k]) for k in group], x.device),
            )
            for group in cheapest(lengths, count, cost_of(decoder, len(decoder.layers)))
        ]
        # References by size, so that those of one size are refined together.
        read = sorted({number for row in images for number in row})
        sizes = sorted({len(self.embedded[number]) for number in read})
        by_size = [[number for number in read if len(self.embedded[number]) == size] for size in sizes]
        return Plan(torch.stack([noise[request] for request in range(len(x))]), by_size, groups)


def run(
    blocks: nn.ModuleList, x: Tensor, turns: Tensor, time: Tensor, mask: Tensor | None = None, first: int | None = None
) -> Tensor:
    """x (rows, T, W) through modulated blocks; of the last one only the `first` tokens."""
    for number, block in enumerate(blocks, start=1):
        x = block(x, turns, mask, time, first if number == len(blocks) else None)
    return x


def padding(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """The mask (rows, 1, 1, T) of sequences of these lengths; None where they are equal."""
    return None if len(set(lengths)) == 1 else real(lengths, device)[:, None, None]
