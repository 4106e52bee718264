"""LoRA of a MODEL: read for its layers from any file, added to it, merged, extracted and written for others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from diptych.checkpoints.lora_files import FORMATS, PEFT_CONFIG, Update, read_lora, stripped, write_lora
from diptych.core.errors import UserError, nearest, unknown
from diptych.core.files import write_folder
from diptych.parts.added_lora import Factors, attach, difference, fold, trained
from diptych.parts.decoders.omnigen2 import OmniGen2
from diptych.parts.decoders.published import PublishedDecoder
from diptych.parts.decoders.qwen_image import QwenImage
from diptych.parts.decoders.zimage import ZImage
from diptych.parts.lora import adapted_module, linear_layers
from diptych.recipes.names import locate
from diptych.systems.bagel.system import BagelSystem
from diptych.systems.base import AssembledSystem, System
from diptych.systems.mllm import MLLMSystem

Layers = dict[str, dict[str, Factors]]
"""Updates by part (`decoder`, `llm`) and layer."""

Given = str | tuple[str, float]
"""A LoRA by its name or path, and its scale: "style.safetensors:0.8", or ("style.safetensors", 0.8)."""


def homes(system: System) -> dict[str, nn.Module]:
    """The modules whose layers take updates, by part: `llm`, and `decoder` where there is one of its own."""
    if isinstance(system, BagelSystem):
        return {"llm": system.network.llm}
    if isinstance(system, AssembledSystem):
        return {"decoder": adapted_module(system.decoder), "llm": adapted_module(system.backbone)}
    if isinstance(system, MLLMSystem):
        return {"llm": adapted_module(system.backbone)}
    raise UserError(f"a system of kind {system.kind!r} has no part that takes LoRA")


def as_list(given: Sequence[Given] | Given) -> list[Given]:
    """One LoRA, or several, as a list."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str) and isinstance(given[1], int | float):
        return [(given[0], float(given[1]))]
    return list(given)  # type: ignore[arg-type]


def scaled(given: Given) -> tuple[str, float]:
    """A LoRA's name and scale; UserError for a scale that is no number."""
    name, scale = given if isinstance(given, tuple) else (given, 1.0)
    before, colon, after = name.rpartition(":")
    if not isinstance(given, tuple) and colon and before and "/" not in after:
        try:
            name, scale = before, float(after)
        except ValueError as error:
            raise UserError(f"LoRA {given}: the scale after the colon is a number, not {after!r}") from error
    if not torch.isfinite(torch.tensor(float(scale))):
        raise UserError(f"LoRA {name}: the scale must be finite, not {scale}")
    return name, float(scale)


def read_for(system: System, name: str) -> Layers:
    """The updates of a file, a folder or a hub id for a system's layers; of a run or a saved model those that it was
    trained with.

    Raises:
        UserError: no LoRA, or one with a layer that the system has not, or has of another size.
    """
    path = Path(name).expanduser()
    place = path if path.exists() else locate(name)
    folders = [place / part for part in ("decoder", "llm") if (place / part / PEFT_CONFIG).is_file()]
    modules = homes(system)
    table = {part: linear_layers(module) for part, module in modules.items()}
    layers: Layers = {}
    updates = [(folder.name, read_lora(folder)) for folder in folders]
    if not folders and place.is_dir() and any((place / inner / "config.json").is_file() for inner in ("", "model")):
        updates = [(part, plain(each)) for part, each in of_saved(place, name).items()]
    for of_part, entries in updates or [(None, read_lora(place))]:
        for key, (down, up, alpha) in entries.items():
            part, layer = find_layer(key, table, of_part, name)
            weight = table[part][layer]
            if (weight.out_features, weight.in_features) != (up.shape[0], down.shape[1]):
                raise UserError(
                    f"{name}: {key} is for a layer of {down.shape[1]} to {up.shape[0]} numbers, this model's has "
                    f"{weight.in_features} to {weight.out_features}; it is of another model"
                )
            layers.setdefault(part, {})[layer] = Factors(down=down, up=up, alpha=alpha)
    return layers


def of_saved(place: Path, name: str) -> Layers:
    """The updates that the model of a folder was trained with; UserError where there are none."""
    from diptych.recipes.load import load_system

    layers = of_model(load_system(str(place))[0])
    if not layers:
        raise UserError(f"{name}: was trained without LoRA")
    return layers


def plain(layers: Mapping[str, Factors]) -> dict[str, Update]:
    """Updates as files hold them."""
    return {name: (each.down, each.up, each.alpha) for name, each in layers.items()}


def find_layer(
    key: str, table: Mapping[str, Mapping[str, nn.Linear]], of_part: str | None, name: str
) -> tuple[str, str]:
    """The part and the layer that a file's name means, with or without prefixes, in dots or in underscores."""
    for candidate, said in stripped(key):
        for part, layers in table.items():
            if (of_part or said or part) != part and len(table) > 1:
                continue
            if candidate in layers:
                return part, candidate
            flat = [layer for layer in layers if layer.replace(".", "_") == candidate]
            if len(flat) == 1:
                return part, flat[0]
    everything = [layer for layers in table.values() for layer in layers]
    guess = nearest([candidate for candidate, _ in stripped(key)][-1], everything)
    raise UserError(f"{name}: this model has no layer {key!r}" + (f"; the nearest is {guess}" if guess else ""))


def add(system: System, given: Iterable[Given]) -> list[str]:
    """Add LoRAs, each with its scale, to a system that will not be trained; what was added, in words.

    The weights stay as they are, in their format, and the updates are float32 beside them.
    """
    pairs = [scaled(each) for each in given]
    updates: dict[str, dict[str, list[tuple[Factors, float]]]] = {}
    for name, scale in pairs:
        for part, layers in read_for(system, name).items():
            for layer, factors in layers.items():
                updates.setdefault(part, {}).setdefault(layer, []).append((factors, scale))
    modules = homes(system)
    for part, layers in updates.items():
        attach(modules[part], layers)
    return [f"{name}:{scale:g}" for name, scale in pairs]


def of_model(system: System) -> Layers:
    """The updates that a model was trained with."""
    updates = {part: trained(module) for part, module in homes(system).items()}
    return {part: layers for part, layers in updates.items() if layers}


def merge(system: System) -> int:
    """Fold a system's updates, added and trained ones, into its weights, which are then its own; how many layers."""
    count = 0
    for part, module in homes(system).items():
        changed = fold(module)
        count += changed
        component = {"decoder": "decoder", "llm": "network" if isinstance(system, BagelSystem) else "backbone"}[part]
        if changed and isinstance(system, AssembledSystem | MLLMSystem):
            system.origins[component] = {**system.origins[component], "weights": None, "lora": None}
    if not count:
        raise UserError("there is no LoRA to merge: the model has none, and none was given")
    return count


def save_merged(model: str, given: Sequence[Given], folder: Path, layout: str = "diptych") -> int:
    """Merge a MODEL's own LoRA and further ones into its weights and save it; how many layers were changed.

    Args:
        layout: "diptych", or "published" for the one that its family is published in.
    """
    from diptych.recipes.load import load_system
    from diptych.recipes.pack import export

    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another folder")
    system, sampling = load_system(model)
    add(system, given)
    count = merge(system)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if layout == "published":
        export(system, folder)
    else:
        system.keep_sampling(dataclasses.asdict(sampling))
        write_folder(folder, system.save_pretrained)
    return count


def export_lora(model: str, folder: Path, format: str, source: str | None = None) -> list[Path]:
    """Write a MODEL's trained LoRA, or a file that fits it, in another library's format; the files.

    Raises:
        UserError: an unknown format, a model without LoRA, or one whose layers the format has no names for.
    """
    from diptych.recipes.load import load_system

    if format not in FORMATS:
        raise unknown("format", format, FORMATS, "--to")
    system, _ = load_system(model)
    layers = of_model(system) if source is None else read_for(system, source)
    if not layers:
        raise UserError(f"{model}: was trained without LoRA; name a file with --lora")
    return write(system, layers, folder, format)


def extract(base: str, tuned: str, folder: Path, rank: int, format: str = "peft") -> tuple[list[Path], float]:
    """Write the difference of two MODELs of the same layers as LoRA of a rank; the files, and the share left out."""
    from diptych.recipes.load import load_system

    if format not in FORMATS:
        raise unknown("format", format, FORMATS, "--to")
    if rank < 1:
        raise UserError(f"--rank must be at least 1, not {rank}")
    before, after = load_system(base)[0], load_system(tuned)[0]
    first, second = homes(before), homes(after)
    if first.keys() != second.keys():
        raise UserError(f"{tuned}: has other parts than {base}")
    layers: Layers = {}
    left: list[float] = []
    for part, module in first.items():
        fold(second[part])
        fold(module)
        if all(torch.equal(a, b) for a, b in zip(module.parameters(), second[part].parameters(), strict=False)):
            continue
        layers[part], share = difference(module, second[part], rank)
        left.append(share)
    if not layers:
        raise UserError(f"{tuned}: its linear layers are those of {base}")
    return write(before, layers, folder, format), max(left)


def unnamed(decoder: object) -> dict[str, str]:
    """The formats whose readers have no names for a decoder's layers, each with the reason."""
    kind, closed = type(decoder).__name__, dict[str, str]()
    if not isinstance(decoder, PublishedDecoder):
        closed["diffusers"] = f"has no decoder of kind {kind}"
    if not isinstance(decoder, OmniGen2 | QwenImage | ZImage):
        known = isinstance(decoder, PublishedDecoder)
        how = f"names the layers of a {kind} otherwise than its release does"
        closed["comfyui"] = how if known else f"has no decoder of kind {kind}"
    return closed


def write(system: System, layers: Layers, folder: Path, format: str) -> list[Path]:
    """Updates of a system's layers in a format, under the names that the format's readers have for these."""
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another folder")
    decoder = system.decoder if isinstance(system, AssembledSystem) and "decoder" in layers else None
    if decoder is not None and format in (closed := unnamed(decoder)):
        others = ", ".join(name for name in FORMATS if name not in closed)
        raise UserError(f"{format} {closed[format]}; write one of {others}")
    made: list[Path] = []

    def fill(temporary: Path) -> None:
        made.extend(
            path.relative_to(temporary)
            for path in write_lora(temporary, {part: plain(each) for part, each in layers.items()}, format)
        )

    folder.parent.mkdir(parents=True, exist_ok=True)
    write_folder(folder, fill)
    return [folder / path for path in made]
