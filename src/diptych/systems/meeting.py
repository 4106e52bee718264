"""Which parts can meet in a composed system and for which tasks, and why others cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diptych.core.errors import UserError
from diptych.core.sample import Task
from diptych.parts.backbones.base import Backbone
from diptych.parts.conditioners.hierarchical_queries import HierarchicalQueries
from diptych.parts.decoders.packing import PackingDecoder
from diptych.systems.presets import ComposedConfig, HieraConfig

if TYPE_CHECKING:
    from diptych.systems.composed import ComposedSystem


def check_parts(system: ComposedSystem, config: ComposedConfig) -> None:
    """UserError for parts or options that do not fit each other, naming both."""
    backbone, conditioner, decoder = system.backbone, system.conditioner, system.decoder
    model, count = type(backbone).__name__, conditioner.count
    name = type(decoder).__name__
    complaints = [
        # The MLLM and what is appended to its prompt.
        (
            config.condition == "queries" and count == 0,
            "condition: 'queries' needs a conditioner that appends queries; 'raw' appends none",
        ),
        (
            count > 0 and not backbone.causal,
            f"conditioner: {model} reads a text as a whole, so that no queries can follow it; use kind: raw",
        ),
        (
            config.prompts.opens and not backbone.causal,
            f"prompts.assistant_turn: {model} answers nothing, so that no turn can be left open for it; use 'closed'",
        ),
        (
            count > backbone.max_length,
            f"conditioner: {count} query tokens and markers, but the MLLM's context is {backbone.max_length}; use "
            "fewer scales or smaller grids",
        ),
        (
            conditioner.places() is not None and backbone.position_axes != 3,
            "conditioner: rotary 'strip' needs an MLLM whose positions have axes, such as qwen2_5_vl",
        ),
        (
            config.blank and not backbone.processor.sees_images,
            f"blank: {model} sees no images; set blank: false",
        ),
        (
            bool(config.pack) and (not backbone.packs or count > 0),
            f"pack: packed rows need an MLLM that reads them and a conditioner that appends nothing, not {model} with "
            f"{count} queries",
        ),
        (
            config.too_long == "cut" and (backbone.position_axes != 1 or count > 0),
            f"too_long: 'cut' needs positions that count tokens and a conditioner that appends nothing, not {model} "
            f"with {count} queries",
        ),
        # The decoder and what it is given.
        (
            system.autoencoder.channels != decoder.channels,
            f"the decoder takes {decoder.channels} latent channels, the autoencoder gives "
            f"{system.autoencoder.channels}",
        ),
        (
            config.reference_latents and not decoder.reads_context,
            f"reference_latents: the decoder {name} reads no context images; leave it out",
        ),
        (
            config.alignment is not None and not backbone.processor.sees_images,
            f"alignment: {model} sees no images",
        ),
        (
            config.alignment is not None and not decoder.hidden,
            f"alignment: {name} gives no states of its blocks; use mmdit, ovis_u1, omnigen2, sd3 or sana, or leave it "
            "out",
        ),
        *routing_complaints(system, config),
        *pooled_complaints(system),
        *scale_complaints(system, config),
    ]
    for wrong, reason in complaints:
        if wrong:
            raise UserError(f"system {system.kind}: {reason}")


def routing_complaints(system: ComposedSystem, config: ComposedConfig) -> list[tuple[bool, str]]:
    """Of image tokens that skip blocks of the decoder."""
    routing, decoder = config.token_routing, system.decoder
    if routing is None:
        return []
    name, depth = type(decoder).__name__, decoder.depth
    first, last = routing.blocks(depth)
    return [
        (
            not decoder.routes,
            f"token_routing: the blocks of {name} cannot be skipped; use mmdit, ovis_u1 or omnigen2, or leave it out",
        ),
        (
            isinstance(config, HieraConfig),
            "token_routing: several scales are packed into one pass, which routes no tokens; leave it out",
        ),
        (
            not 1 <= first <= last <= depth or 0 in (routing.first, routing.last),
            f"token_routing: first {routing.first} and last {routing.last} are no range of {name}'s {depth} blocks "
            f"(1 to {depth}, or -1 to -{depth} from the end)",
        ),
    ]


def pooled_complaints(system: ComposedSystem) -> list[tuple[bool, str]]:
    """Of the refiner, the pooler, and the decoder that takes their tokens and their vector."""
    decoder, refiner, pooler = system.decoder, system.refiner, system.pooler
    taken = decoder.pooled_width
    complaints: list[tuple[bool, str]] = [
        (pooler is not None and taken is None, f"pooler: the decoder {type(decoder).__name__} takes no pooled vector")
    ]
    vector = None if pooler is None else pooler.width
    if refiner is not None:
        raw, config = system.options.layers * system.backbone.width, refiner.config
        pools = config.pool != "none"
        vector = config.hidden if pools else vector
        complaints += [
            (
                taken is not None and pools == (pooler is not None),
                "the decoder needs one vector for the whole prompt: the refiner's (pool cls or average) or, with pool "
                "none, that of a pooler",
            ),
            (config.context_width != raw, f"the refiner takes states of width {config.context_width}, but gets {raw}"),
            (
                config.hidden != decoder.condition_width,
                f"the decoder takes tokens of width {decoder.condition_width}, but gets {config.hidden}",
            ),
        ]
    wrong = taken is not None and vector is not None and vector != taken
    return [*complaints, (wrong, f"the decoder takes a vector of width {taken}, but gets {vector}")]


def scale_complaints(system: ComposedSystem, config: ComposedConfig) -> list[tuple[bool, str]]:
    """Of a system with several scales."""
    if not isinstance(config, HieraConfig):
        return []
    conditioner, decoder = system.conditioner, system.decoder
    return [
        (
            not isinstance(conditioner, HierarchicalQueries),
            "its conditioner is of kind 'hierarchical_queries'",
        ),
        (
            not isinstance(decoder, PackingDecoder),
            f"the decoder {type(decoder).__name__} takes one image at a time; use mmdit, sd3 or sana",
        ),
        (
            system.refiner is not None or config.layers != 1 or config.mllm_images == "dropped",
            "several scales go with one layer's states, no refiner, and images that stay in",
        ),
    ]


def tasks_of(config: ComposedConfig, backbone: Backbone) -> tuple[Task, ...]:
    """The tasks of a system with these options."""
    tasks: list[Task] = ["text_to_image"]
    if backbone.processor.sees_images:
        tasks = [*(["image"] if config.prompts.image else []), "text_to_image", "edit"]  # type: ignore[list-item]
    return (*tasks, "understand") if backbone.causal else tuple(tasks)
