"""HieraQuery (Sec. 3): an image of its own resolution from the queries of each scale, features aligned across scales.

    states of [START_1, Q_1, END_1, ..., END_K] -> connector, scale by scale -> K conditions -> decoder

With one scale and no grid positions it is MetaQuery, the baseline (see the recipes).

B batch, K scales, N_k queries of scale k, D MLLM width, C latent channels, h_k and w_k latent sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from diptych.core.condition import ScaleConditions, TokenCondition
from diptych.core.draws import Draws
from diptych.core.prepared import SizeGroups
from diptych.objectives.alignment import alignment_loss, resample_each
from diptych.objectives.flow_matching import interpolate
from diptych.parts.decoders.packing import Packed
from diptych.systems.conditioned_inputs import Targets
from diptych.systems.grids import Scales
from diptych.systems.presets import ComposedConfig, HieraConfig

if TYPE_CHECKING:
    from diptych.systems.composed import ComposedSystem


def scales(config: ComposedConfig, conditioner: Any) -> Scales | None:
    """The scales of a system with `HierarchicalQueries`; None for one that makes its image alone."""
    if not isinstance(config, HieraConfig):
        return None
    return Scales(
        names=conditioner.names,
        sides=conditioner.scales,
        smart=config.scale_rounding == "smart",
    )


def options(system: ComposedSystem) -> HieraConfig:
    """The options of a system with scales."""
    return cast(HieraConfig, system.options)


def conditions(system: ComposedSystem, states: Tensor) -> ScaleConditions:
    """Conditions of all scales from the states (B, Q, D) of the appended tokens."""
    conditioner: Any = system.conditioner  # `HierarchicalQueries`, as `meeting.check_parts` makes sure
    tokens_of = [system.connector(scale) for scale in conditioner.split(states)]  # (B, N_k, C) each
    pooled = None if system.pooled is None else system.pooled(torch.cat(tokens_of, dim=1).mean(1))  # (B, P)
    if options(system).scale_condition == "cumulative":
        tokens_of = [torch.cat(tokens_of[: k + 1], dim=1) for k in range(len(tokens_of))]
    return ScaleConditions(scales=tuple(TokenCondition(tokens=tokens, pooled=pooled) for tokens in tokens_of))


def losses(
    system: ComposedSystem,
    condition: ScaleConditions,
    targets: Targets,
    draws: Draws,
    names: Sequence[str],
    features: Sequence[Tensor] = (),
) -> dict[str, Tensor]:
    """Values (B,) of `flow_SCALE`, and with alignment of `align_SCALE`, for each scale.

    Args:
        features: with alignment, of the MLLM of each image to make, each (D, rows, columns).
    """
    config = options(system)
    data = scale_latents(system, targets, names)
    noise = [draws.normal(f"noise.{name}", *x.shape[1:]) for name, x in zip(system.scales, data, strict=True)]
    # Times (B,) of each scale, the same for all where they are shared.
    flow, tokens = config.flow, system.decoder.tokens
    if config.shared_timestep:
        t = [flow.times(draws, tokens(data[-1]))] * len(data)
    else:
        t = [flow.times(draws, tokens(x), f"time.{name}") for name, x in zip(system.scales, data, strict=True)]
    xs = [interpolate(*three) for three in zip(data, noise, t, strict=True)]
    packed = decode(system, config, xs, t, condition.scales)
    values: dict[str, Tensor] = {}
    for k, name in enumerate(system.scales):
        weights = torch.stack(targets.weights[k].each()) if targets.weights else None
        values[f"flow_{name}"] = flow.loss(packed.outputs[k], data[k], noise[k], xs[k], t[k], weights)
    if system.projector is not None:
        # Minus cosine between the decoder's states and the MLLM's features of the whole image.
        for name, state, x in zip(system.scales, packed.states, xs, strict=True):
            rows, columns = x.shape[-2] // system.decoder.patch, x.shape[-1] // system.decoder.patch
            wanted = resample_each(features, rows, columns)  # (B, N_k, D)
            values[f"align_{name}"] = alignment_loss(system.projector(state), wanted)
    return values


def scale_latents(system: ComposedSystem, targets: Targets, names: Sequence[str]) -> list[Tensor]:
    """Latents of the images at every scale, (B, C, h_k, w_k) each; smaller images are resized ones."""
    smaller = [system.target_latents(whole(images), names) for images in targets.smaller]
    return [torch.stack(x) for x in [*smaller, system.target_latents(targets, names)]]


def decode(
    system: ComposedSystem, config: HieraConfig, xs: list[Tensor], t: list[Tensor], seen: tuple[TokenCondition, ...]
) -> Packed:
    """All scales through the decoder: in one pass where they share their time, else one after the other."""
    decoder: Any = system.decoder  # a `PackingDecoder`, as `meeting.check_parts` makes sure
    layer = None if config.alignment is None else config.alignment.layer
    if config.shared_timestep:
        return decoder.pack(xs, t[-1], seen, layer)
    each = [decoder.pack([x], now, [condition], layer) for x, now, condition in zip(xs, t, seen, strict=True)]
    return Packed([made.outputs[0] for made in each], [state for made in each for state in made.states])


def whole(images: SizeGroups) -> Targets:
    """Images alone as targets."""
    return Targets(images=images, latents=SizeGroups(), cached=(False,) * len(images), smaller=())
