"""A MODEL by name, as a system or as an engine that answers and draws."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diptych.checkpoints.deferred import active, deferred
from diptych.checkpoints.finite import check_finite
from diptych.checkpoints.tensors import LORA, PICKLES, PROJECTOR, load_into, read_tensors, weight_files
from diptych.core.draws import key
from diptych.core.errors import UserError, attributed_to, unknown
from diptych.core.leaving import leave_quickly
from diptych.core.schema import read
from diptych.inference.placement import Offload, Quantization, cast, number_format, quantize
from diptych.inference.sampling import Sampling
from diptych.recipes.bases import read_references
from diptych.recipes.build import FAMILIES, build_system
from diptych.recipes.families.base import Family, read_json
from diptych.recipes.families.mllm import MODEL_TYPES
from diptych.recipes.legacy import read_config, with_new_names
from diptych.recipes.model import Model
from diptych.recipes.names import locate
from diptych.recipes.plain import merge
from diptych.recipes.recipe import VARIANTS, Part, Recipe, StageSpec, SystemSpec, parse
from diptych.recipes.tables import choose
from diptych.systems.base import System
from diptych.training import state
from diptych.training.loop import freeze
from diptych.training.optimizers import trainable

if TYPE_CHECKING:
    from diptych.recipes.lora import Given


def load(
    model: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = "auto",
    quantize: Quantization = "none",
    offload: Offload = "none",
    tile: int | None = None,
    fit: str | int | None = None,
    lora: Sequence[Given] | Given = (),
) -> Model:
    """A model that generates, edits and answers.

    Args:
        model: a shipped name (`toy/iomm`), a run folder or one of its checkpoints, a folder in save_pretrained layout,
            or a hub id.
        device: "cpu", "cuda", "cuda:1", "mps"; the best there is for "auto".
        dtype: number format of the weights: "float32", "bfloat16", "float16"; "auto" for that of the files.
        quantize: format of the weights of linear layers in the blocks: "int8", "fp8", "nf4".
        offload: what is in host memory while it does not run: "model" (the parts that do not run), "layers" (all but
            the block that runs and the next).
        tile: side in pixels of the squares that larger images are decoded in.
        fit: memory of the device ("24GB", or bytes) that the model is to take at most: the choices above that are left
            open are made so that it fits (`recipes.fit`).
        lora: LoRA files, folders or hub ids in any format that `docs/lora.md` lists, each with a scale
            ("style.safetensors:0.8", or a pair); their updates are added.

    Raises:
        UserError: files that are not readable or do not fit, a device or format that is not there, or a model that
            no choice fits into `fit`.
    """
    leave_quickly()
    placing: Any = {"quantize": quantize, "offload": offload, "tile": tile, "fit": fit, "lora": lora}
    return Model.from_pretrained(model, device=device, dtype=dtype, **placing)


def load_system(model: str, dtype: torch.dtype | None = None) -> tuple[System, Sampling]:
    """The system and its sampling defaults; UserError names what is wrong with the model's files.

    Args:
        dtype: number format of the weights; None for that of the files. Weights are never there in another one.
    """
    with attributed_to(model):
        folder = locate(model)
        if dtype is None and loads_as_float32(folder):
            system, sampling = _load_system(folder, model)
        else:
            with deferred() as weights:
                system, sampling = _load_system(folder, model)
                if dtype is not None:
                    cast(system, dtype)
            if active() is None:  # otherwise what stands around this makes the weights
                weights.plan(system).fill()
        check_finite(system, model)
    return system, sampling


def loads_as_float32(folder: Path) -> bool:
    """Whether a folder's weights become float32 as far as one sees: those of runs, and of most saved systems. They are
    read at once, which takes less time than describing them first."""
    for place in (folder, folder / "model"):
        if "kind" in (config := read_json(place / "config.json")):
            return config.get("dtype", "float32") == "float32"
    return state.is_checkpoint(folder) or (folder / "checkpoints").is_dir()


def _load_system(folder: Path, model: str) -> tuple[System, Sampling]:
    # A model in this folder, or as the result of the run that lies here: one that Diptych saved, or a release in the
    # layout of its family.
    for place in (folder, folder / "model"):
        if "kind" in read_json(place / "config.json"):
            return read_saved(place)
        for family in families():
            if family.detect(place):
                return family.from_release(place, model)
    # A run that has not ended, by its checkpoint.
    checkpoint = folder if state.is_checkpoint(folder) else state.newest(folder / "checkpoints")
    if checkpoint:
        return from_checkpoint(checkpoint, model), parse(with_new_names(state.read_recipe(checkpoint)), model).sampling
    raise unreadable(folder, model)


def families() -> list[Family[Any]]:
    """Those whose releases are read and written, in the order in which they are asked."""
    classes: list[Any] = [choose("family", name, FAMILIES, Family) for name in FAMILIES]
    return [family() for family in classes]


def unreadable(folder: Path, model: str) -> UserError:
    """What is wrong with a folder that is no model."""
    file = folder / "config.json"
    index = read_json(folder / "model_index.json").get("_class_name")
    if index is not None:
        return unknown("pipeline", str(index), ["OmniGen2Pipeline", "QwenImagePipeline"], str(folder))
    if not file.is_file():
        return UserError(f"{model}: no model here (neither config.json nor a run's checkpoints)")
    kind = read_json(file).get("model_type")
    if kind is None:
        return UserError(f"{file}: not a Diptych model (no 'kind')")
    return unknown("model_type", str(kind), MODEL_TYPES, str(file))


def read_saved(folder: Path) -> tuple[System, Sampling]:
    """A system that Diptych saved."""
    where = str(folder / "config.json")
    config = read_config(read_references(read_json(folder / "config.json"), folder), where)
    formats = config.pop("dtype", "float32")
    spec: Any = read(SystemSpec, config, where, VARIANTS)
    system = build_system(spec, assets=folder)
    with attributed_to(f"{where}: dtype"):
        if isinstance(formats, dict):
            for name, part in system.named_children():
                cast(part, number_format(formats.get(name, "float32")))
        else:
            cast(system, number_format(formats))
    load_folder_weights(system, folder)
    return system, read(Sampling, spec.sampling, f"{where}: sampling")


def load_folder_weights(system: System, folder: Path) -> None:
    """The weights of a saved folder into a system; parts that the folder refers to are already there."""

    tensors = read_tensors(weight_files(folder))
    load_into(system, tensors, str(folder), optional=lambda name: not system.stores(name))


def from_checkpoint(checkpoint: Path, model: str) -> System:
    """An unfinished run: the recipe's start, and the (averaged) weights that were trained so far on top."""
    recipe = parse(with_new_names(state.read_recipe(checkpoint)), model)
    with deferred() as weights:  # also those of a whole other system, of which there is one tensor at a time
        system = start(recipe)
    if active() is None:
        weights.plan(system).fill()
    position = state.read_progress(checkpoint).stage
    learned: dict[str, nn.Parameter] = {}
    for spec in list(recipe.stages.values())[: position + 1]:
        freeze(system, spec.train)
        learned |= trainable(system)
    state.load_weights(checkpoint, learned, averaged=True)
    system.requires_grad_(False)
    stage_settings(system, list(recipe.stages.values()))(position)
    return system


def stage_settings(system: System, stages: Sequence[StageSpec]) -> Callable[[int], None]:
    """Sets the system's options for a stage: its own, with those that the stage sets on top.

    Raises:
        UserError: now, for an option of any stage that is unknown or wrong, that needs weights the system does not
            have, or that is set for a system without options.
    """

    def wanted(position: int) -> Any:
        changes, where = stages[position].settings, f"settings of stage {position + 1}"
        if base is None:
            if changes:
                raise UserError(f"{where}: this system has no options that a stage could set")
            return None
        settings = read(type(system.settings), merge(base, changes), where)
        if getattr(settings, "mask_mode", None) == "mask_token" != base["mask_mode"]:
            raise UserError(f"{where}: mask_mode 'mask_token' is learned; set it for the system, not for a stage alone")
        if dataclasses.asdict(settings).get("alignment") != base.get("alignment"):
            raise UserError(f"{where}: alignment has a projector of its own; set it for the system, weigh it by stage")
        return settings

    base = None if system.settings is None else dataclasses.asdict(system.settings)
    by_stage = [wanted(position) for position in range(len(stages))]

    def apply(position: int) -> None:
        settings = by_stage[position]
        if settings is not None:
            system.settings = settings

    return apply


def start(recipe: Recipe, *, quantized: bool = False) -> System:
    """The system that a recipe starts from: its own parts, with the weights of `start` on top where given.

    Random weights are those of the recipe's seed, so that a resumed run has the same ones.

    Args:
        quantized: put the parts that the recipe quantises into their formats, for training.

    Raises:
        UserError: weights that do not fit, a quantised part that a stage trains whole, or an alignment whose projector
            neither `start` nor a stage brings.
    """
    torch.manual_seed(key(recipe.seed, "weights"))
    system = build_system(recipe.system)
    if recipe.start is not None:
        kept = read_start(system, recipe.start)
        if any(name.startswith(PROJECTOR) for name in kept):
            check_projector_learns(system, recipe)
    if quantized:
        quantize_frozen(system, recipe)
    return system


def check_quantized(system: System, recipe: Recipe) -> None:
    """UserError for a stage that trains a part whole whose frozen weights the recipe wants quantised."""
    for name, format in quantized_parts(recipe).items():
        part: Any = getattr(system, name)
        inside = {id(p) for p in part.parameters()}
        parts = system.named_parts()
        for stage_name, stage in recipe.stages.items():
            for trained in stage.train:
                whole = parts[trained].parameters() if trained in parts and trained != "lora" else ()
                if any(id(p) in inside for p in whole):
                    raise UserError(
                        f"stages.{stage_name}.train: {trained!r} is quantised ({name}.quantize: {format}) and cannot "
                        "be trained whole; train lora on it, or leave out quantize"
                    )


def quantize_frozen(
    system: System, recipe: Recipe, convert: Callable[[Quantization, nn.Linear], nn.Module] | None = None
) -> None:
    """Put the parts whose `quantize` the recipe sets into that format, their adapters excepted.

    Args:
        convert: makes the quantised layer; by default by the format's library.
    """
    check_quantized(system, recipe)
    for name, format in quantized_parts(recipe).items():
        part: Any = getattr(system, name)
        for parameter in part.parameters():
            parameter.requires_grad_(False)
        inside = {id(module) for module in part.modules()}
        units = [unit for unit in system.shard_units() if id(unit) in inside]
        quantize(units, format, None if convert is None else functools.partial(convert, format))


def quantized_parts(recipe: Recipe) -> dict[str, Quantization]:
    """Formats by the names of the parts that are quantised in training."""
    formats: dict[str, Quantization] = {}
    for name in ("backbone", "decoder", "network"):
        part = getattr(recipe.system, name, None)
        if isinstance(part, Part) and part.quantize != "none":
            formats[name] = part.quantize
    return formats


def read_start(system: System, name: str) -> set[str]:
    """The weights of a recipe's `start` into its system; names of those that it does not have and that stay as they
    are: adapters, and an alignment's projector."""
    file = Path(name).expanduser()
    if file.suffix == ".safetensors" or file.suffix in PICKLES:
        for family in families():
            if family.one_file and family.holds(system):
                family.read_weights(system, file)
                return {name for name in system.state_dict() if name.startswith(PROJECTOR)}
        raise UserError(
            f"start: {file}: single files of weights are read for systems of OpenUni's or MetaQuery's parts, as in "
            "iomm/openuni_l_finetune_mix and metaquery/sana; this one has others"
        )
    source, _ = load_system(name)
    check_words(system, source, name)
    kept = copy_weights(system, source, name)
    own_others(system, source)
    return kept


def check_projector_learns(system: System, recipe: Recipe) -> None:
    """UserError where a stage holds states against features through a projector that is as it was drawn, for ever."""
    from diptych.recipes.loss_terms import aligns  # what a model that is loaded alone does not need

    learns_by = [name for name, stage in recipe.stages.items() if aligns(system, stage)]
    if learns_by and not any("alignment" in stage.train for stage in recipe.stages.values()):
        raise UserError(
            f"stages.{learns_by[0]}.train: system.alignment compares through a projector, which start "
            f"({recipe.start}) does not have and no stage trains; add alignment to train, or set system.alignment: null"
        )


BASE_LAYER = ".base_layer."
"""In the names of weights of layers that have adapters."""


def check_words(system: System, source: System, name: str) -> None:
    """UserError where the same ids are other words in `source`: its embeddings would stand for the wrong ones."""
    ours, theirs = words(system), words(source)
    if ours and theirs and ours != theirs:
        raise UserError(
            f"start: {name}: its tokenizer is not the recipe's (other words, or other ids for them); name it as the "
            "backbone's weights instead, which brings its tokenizer"
        )


def words(system: System) -> dict[str, int]:
    """Words and ids of a system's tokenizer; none where it has no one tokenizer."""
    tokenizer = getattr(system, "tokenizer", None) or getattr(getattr(system, "backbone", None), "tokenizer", None)
    return dict(tokenizer.get_vocab()) if tokenizer is not None else {}


def own_others(system: System, source: System) -> None:
    """Parts whose weights in `source` are not those that `system` names no longer stand for that name."""
    for part in system.components:
        if system.origins[part].get("weights") != source.origins[part].get("weights"):
            system.origins[part] = {**system.origins[part], "weights": None}


def copy_weights(system: System, source: System, name: str) -> set[str]:
    """Every weight of `source` into `system`, strictly; adapters and an alignment's projector of `system` stay as they
    are where it has none (their names are returned), and its projector is left out where `system` has none."""
    tensors = source.state_dict()
    if getattr(system, "projector", None) is None:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(PROJECTOR)}
    adapted = {name.replace(BASE_LAYER, "."): name for name in system.state_dict() if BASE_LAYER in name}
    rename = {} if any(BASE_LAYER in name for name in tensors) else adapted
    optional = {name for name in system.state_dict() if LORA in name or name.startswith(PROJECTOR)} - tensors.keys()
    load_into(system, iter(tensors.items()), name, optional=lambda key: key in optional, rename=rename)
    return optional
