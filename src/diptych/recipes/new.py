"""A recipe for pictures of one's own, written whole: adapters on a MODEL, sized for the pictures and for a card."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import nn

from diptych.core.errors import UserError, attributed_to
from diptych.core.sample import Task
from diptych.data.buckets import buckets
from diptych.data.source import ItemDraws
from diptych.data.survey import Survey, survey
from diptych.data.variations import Variations, varied_text
from diptych.parts.lora import adaptable
from diptych.recipes.build import build_system
from diptych.recipes.check import check_system
from diptych.recipes.fit import CONTEXT_BYTES, amount, memory
from diptych.recipes.from_model import with_system
from diptych.recipes.plain import load_plain, names
from diptych.recipes.prepared import needed_by, useful_kinds
from diptych.recipes.recipe import parse
from diptych.systems.base import System

SIDES = (1024, 768, 512, 384, 256)
"""Image sides that are tried, largest first, where a card is to hold the step."""
ATTENTION = re.compile(r"to_(q|k|v|out#0|add_out)|(add_)?(q|k|v|o|out)_proj|qkv|((image|text|self)_)?out")
"""Last names of the linear layers of attention in the decoders and language models here."""
LARGE = 100_000_000
"""Parameters from which a model counts as no toy: bfloat16, recomputed activations, a lower rate."""
VISITS = 25
"""How often each picture is seen, as far as `STEPS` allows."""
STEPS = (100, 4000)
BATCH = 4
RATIO = 2.0
"""Longest side over shortest of the shapes that pictures may keep."""
PROMPTS = 4
"""Captions of the folder that are drawn while training."""


PRESETS = {
    "bagel": "bagel/lora",
    "omnigen2": "omnigen2/lora",
    "ovis_u1": "ovis_u1/lora",
    "qwen_image": "qwen_image/lora",
    "hieraquery": "hieraquery/sana_lora",
}
"""Recipes for a card by the kind of the system or of its decoder; _12gb, _24gb or _80gb follows."""
CARDS = {"_80gb": 80 * 10**9, "_24gb": 24 * 10**9, "_12gb": 0}
"""The card's memory from which each is taken; models that fit no card of 12 GB have no recipe for it."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the recipe says that depends on model, folder and card.

    owner: the part of the system that gets adapters. targets: last names of the layers that do. side: of images, in
    pixels. micro_batch_size: samples of a pass. quantize: parts whose frozen weights are in nf4. optimizer: its kind.
    preset: the recipe that rank, quantize and optimizer are of. trigger: the word that stands before each caption.
    expands: whether the model writes prompts out before it draws, by what it has learned so far. adapters: those that
    the model has already and that learn on, as YAML in one line; "" for new ones. shapes: whether it
    takes images twice as long as wide. cached: whether the run keeps the latents that it makes.
    """

    model: str
    owner: str
    targets: tuple[str, ...]
    side: int
    micro_batch_size: int
    large: bool
    rank: int = 16
    quantize: tuple[str, ...] = ()
    optimizer: str = "adamw"
    preset: str = ""
    trigger: str = ""
    expands: bool = False
    adapters: str = ""
    shapes: bool = True
    cached: bool = False


class NewRecipe(NamedTuple):
    """text: of the recipe. look: at the folder. reason: how the size of the images was chosen. prepares: what of its
    items is worth making once (`diptych prepare --what`), empty where nothing is. half: whether in bfloat16."""

    text: str
    look: Survey
    reason: str
    prepares: tuple[str, ...] = ()
    half: bool = False

    def steps(self, file: str, run: str) -> list[str]:
        """The commands that follow, for the recipe as `file`."""
        return steps_of(file, run, self.prepares, self.half)


def new_recipe(
    folder: Path,
    model: str,
    *,
    task: Task | None = None,
    card: str | None = None,
    home: Path | None = None,
    trigger: str = "",
    prepare: bool | None = None,
) -> NewRecipe:
    """A recipe for a folder.

    Args:
        folder: pictures, with captions or without; for edits and conversations one JSONL file with its pictures.
        task: what is to be learned; by default drawing from captions where there are any, else from images alone.
        card: memory of the device that is to hold a step ("24GB"); None for the size of model and pictures.
        trigger: a word that stands before each caption, "" for none.
        prepare: whether it reads what `diptych prepare` makes; None for models that are no toys.
        home: folder that the recipe will lie in, to which its path is relative; None for an absolute one.

    Raises:
        UserError: nothing usable in the folder, a model without a part for the task, or a card that no size fits.
    """
    with attributed_to("--trigger"):
        Variations(trigger=trigger)
    look = survey(folder, task)
    drafted = with_system({"start": model, "stages": {}})
    stage = {"train": ["decoder"], "steps": 1, "batch_size": 1, "data": {"sources": {}}}
    system = build_system(parse({**drafted, "stages": {"draft": stage}}, model).system, meta=True)
    large = sum(parameter.numel() for parameter in system.parameters()) >= LARGE
    side, reason = image_side(drafted, system, look)
    owner, part = adapted(system, look.task)
    settings = Settings(
        model=model,
        owner=owner,
        targets=attention_layers(part, generates=look.task != "understand"),
        side=side,
        micro_batch_size=min(BATCH, look.items),
        large=large,
    )
    expands = bool(drafted.get("sampling", {}).get("prompt_expansion")) and look.task != "understand"
    given = (drafted["system"].get(owner) or {}).get("lora")
    settings = replace(settings, trigger=trigger, expands=expands, shapes=takes_shapes(system, side))
    settings = replace(settings, adapters=_flow(given) if given else "")
    if card is not None:
        settings, reason = fitting(with_preset(settings, drafted, card), look, card)
    small = look.enlarged(settings.side)
    if len(small):
        height, width = small[0].tolist()
        reason += (
            f"; {len(small):,} are enlarged to it more than twice, the smallest {width}x{height} (filters.min_side)"
        )
    prepares = kept_kinds(settings, look)
    if prepare and not prepares:
        raise UserError(f"--prepare: nothing of task {look.task} stays the same in every step of this model")
    if prepare is False or (prepare is None and not large):
        prepares = ()
    if prepares == ("latents",):  # which a run keeps by itself, as it makes them
        settings, prepares = replace(settings, cached=True), ()
    return NewRecipe(text(settings, look, home, prepares), look, reason, prepares, large)


def kept_kinds(settings: Settings, look: Survey) -> tuple[str, ...]:
    """What of the items stays the same in every visit, by what the recipe trains."""
    recipe = parse(with_system(yaml.safe_load(text(settings, look))), settings.model)
    return useful_kinds(needed_by(recipe, "tune", build_system(recipe.system, meta=True)), look.task)


def image_side(drafted: dict[str, Any], system: System, look: Survey) -> tuple[int, str]:
    """The model's image side, or the largest multiple of its step that the pictures fill, and why."""
    model = max(drafted.get("sampling", {}).get("size") or [512])
    if look.task == "understand":
        return model, "conversations are read at the size of their pictures"
    if not look.side or look.side >= model:
        return model, f"images of {model} px, the model's own size"
    step = system.image_step
    side = max(look.side // step, 1) * step
    return side, f"images of {side} px: most pictures are smaller than the model's own {model} px"


def takes_shapes(system: System, side: int) -> bool:
    """Whether a model takes every size of the buckets about a square of `side`."""
    try:
        for size in buckets(side, system.image_step, RATIO):
            system.latent_shape(*size)
            system.scale_sizes(*size)
    except UserError:
        return False
    return True


def adapted(system: System, task: Task) -> tuple[str, nn.Module]:
    """The part that gets adapters, by its name in a recipe: what draws, or for conversations what answers."""
    for name in ("network", "backbone" if task == "understand" else "decoder"):
        part = getattr(system, name, None)
        if isinstance(part, nn.Module):
            return name, part
    raise UserError(f"this model has no part for task {task} that could get adapters")


def attention_layers(part: nn.Module, *, generates: bool) -> tuple[str, ...]:
    """Last names of the linear layers of attention, as targets of adapters; of BAGEL those of one of its experts."""
    leaves: set[str] = set()
    expert = "gen" if generates else "und"
    for name in adaptable(part):
        *path, last = re.sub(r"\.(?=\d+$)", "#", name).split(".")
        if not ATTENTION.fullmatch(last) or not any(map(str.isdigit, path)):
            continue
        if path[-1] in ("gen", "und"):
            leaves |= {f"{expert}.{last}"}
        elif not name.startswith("vision."):
            leaves |= {last.replace("#", ".")}
    paired = {leaf for leaf in leaves if leaf.startswith(f"{expert}.")}
    if not leaves:
        raise UserError("this model's layers of attention have no names that are known; write `lora: targets` yourself")
    return tuple(sorted(paired or leaves))


def with_preset(settings: Settings, drafted: dict[str, Any], card: str) -> Settings:
    """The settings with what the library's recipe for such a card and model says; of toy models as they are."""
    system = drafted["system"]
    decoder = (system.get("decoder") or {}).get("kind")
    name = PRESETS.get(system["kind"]) or PRESETS.get(str(decoder))
    if not settings.large or name is None:
        return settings
    fitting = [suffix for suffix, least in CARDS.items() if memory(card) >= least]
    name += next((suffix for suffix in fitting if f"{name}{suffix}" in names()), "_24gb")
    plain = load_plain(name)
    parts, (stage,) = plain["system"], (stage for stage in plain["stages"].values() if stage)
    quantize = tuple(part for part, values in parts.items() if isinstance(values, dict) and "quantize" in values)
    rank = parts[settings.owner]["lora"]["rank"] if "lora" in parts.get(settings.owner, {}) else settings.rank
    return replace(settings, rank=rank, quantize=quantize, optimizer=stage["optimizer"]["kind"], preset=name)


def fitting(settings: Settings, look: Survey, card: str) -> tuple[Settings, str]:
    """The largest images, and then passes, whose step the card holds.

    Raises:
        UserError: not even the smallest fits; the message says what that needs.
    """
    budget, need = memory(card, "--card"), 0
    sides = [settings.side, *(side for side in SIDES if side < settings.side)]
    for side in sides:
        for count in sorted({settings.micro_batch_size, 1}, reverse=True):
            tried = replace(settings, side=side, micro_batch_size=count)
            recipe = parse(with_system(yaml.safe_load(text(tried, look))), settings.model)
            need = check_system(recipe).stages[0].memory.total + CONTEXT_BYTES["cuda"]
            if need <= budget:
                return tried, f"images of {side} px, {count} a pass: a step takes about {amount(need)} of {card}"
    raise UserError(
        f"--card {card}: not even one image of {sides[-1]} px a pass fits; that takes about {amount(need, up=True)}"
    )


def text(settings: Settings, look: Survey, home: Path | None = None, prepares: Sequence[str] = ()) -> str:
    """The recipe as commented YAML. prepares: what `diptych prepare` makes of the items."""
    steps = min(max(look.items * VISITS // BATCH, STEPS[0]), STEPS[1])
    path = str(look.path.resolve())
    if home is not None:
        path = os.path.relpath(path, home.resolve())
    if settings.trigger and look.task not in ("text_to_image", "edit"):
        raise UserError(f"--trigger {settings.trigger}: task {look.task} has no captions that it could stand before")
    vary = {"vary": {"trigger": settings.trigger}} if settings.trigger else {}
    missing = "error" if look.masks == look.items else "full_weight"
    masks = {"masks": {"missing": missing}} if look.masks else {}
    kept = {"prepared": beside(path, look.kind, "prepared")} if prepares else {}
    source: dict[str, Any] = {"kind": look.kind, "task": look.task, "path": path, **masks, **vary, **kept}
    shapes = settings.shapes and look.aspect > 1.1 and look.task != "understand"
    run: dict[str, Any] = {"save_every": max(steps // 4, 1), "validate_every": max(steps // 4, 1)}
    if look.task in ("text_to_image", "edit"):
        run["sample_every"] = max(steps // 4, 1)
    if settings.large:
        parts = ["llm" if look.task == "understand" else "decoder"]
        run |= {"precision": "bf16", "frozen_weights": "bfloat16", "checkpointing": parts}
    lora = {"rank": settings.rank, "alpha": settings.rank, "targets": list(settings.targets)}
    if settings.trigger:
        varied = Variations(trigger=settings.trigger)
        look = replace(look, texts=tuple(varied_text(text, varied, ItemDraws(0)) for text in look.texts))
    words = f"  # frozen weights, as {settings.preset}; needs the extra quantize and a GPU"
    others = [part for part in settings.quantize if part != settings.owner]
    quantized = [f"    quantize: nf4{words}"] if settings.owner in settings.quantize else []
    quantized += [f"  {part}: {{quantize: nf4}}" for part in others]
    captions = list(dict.fromkeys(look.texts))[:: max(len(dict.fromkeys(look.texts)) // PROMPTS, 1)][:PROMPTS]
    then = ";  ".join(steps_of("FILE", "mine", prepares, settings.large))
    lines = [
        f"# {settings.model}, tuned by low-rank adapters on {look.path.resolve().name}: {look.items:,} items.",
        f"# Written by `diptych new`. Look at it, then:  {then}",
        f"start: {_flow(settings.model)}  # the system, its prompts and its sampling are this model's",
        "seed: 0",
        "system:",
        f"  {settings.owner}:",
        f"    lora: {settings.adapters}  # which the model has, and which learn on"
        if settings.adapters
        else f"    lora: {_flow(lora)}  # more rank learns more, and forgets more",
        *quantized,
        "stages:",
        "  tune:",
        "    train: [lora]",
        f"    steps: {steps}  # each picture about {steps * BATCH / look.items:.0f} times",
        f"    batch_size: {min(BATCH, look.items)}",
        f"    micro_batch_size: {settings.micro_batch_size}  # samples of a pass; smaller takes less memory",
        f"    optimizer: {{kind: {settings.optimizer}, lr: {'1.0e-4' if settings.large else '1.0e-3'}}}",
        f"    schedule: {{kind: cosine, warmup: {min(100, steps // 10)}, end: 0.1}}",
        "    data:",
        f"      size: {settings.side}  # of the images, in pixels",
        *([f"      buckets: {RATIO}  # pictures keep their shapes, up to twice as long as wide"] if shapes else []),
        f"      held_out: {min(32, look.items // 10)}  # not learned; their loss tells when to stop",
        "      max_bad_fraction: 0.05  # of unreadable pictures, which are named and passed over",
        *(
            [f"      cache: {_flow(beside(path, look.kind, 'latents'))}  # latents of the images, once made"]
            if settings.cached
            else []
        ),
        "      sources:",
        *(
            [f"        # {' and '.join(prepares)} are read from `prepared`, once diptych prepare has made them"]
            if kept
            else []
        ),
        f"        mine: {_flow(source)}",
        f"run: {_flow(run)}",
    ]
    if settings.expands:
        lines.append(
            "sampling: {prompt_expansion: 0}  # captions as they stand; the model would write them out by its past"
        )
    if look.task == "text_to_image" and captions:
        lines += [
            "sample_prompts:  # drawn into samples/ while it learns",
            *(f"  - {_flow(text)}" for text in captions),
        ]
    if look.edits:
        lines.append("sample_edits:  # drawn into samples/ while it learns")
    for words, images in look.edits:
        places = [str(image.resolve()) for image in images]
        if home is not None:
            places = [os.path.relpath(place, home.resolve()) for place in places]
        lines.append(f"  - {_flow({'text': words, 'images': places})}")
    return "\n".join(lines) + "\n"


def steps_of(file: str, run: str, prepares: Sequence[str], half: bool) -> list[str]:
    """As `NewRecipe.steps`."""
    format = " --dtype bfloat16" if half else ""
    made = [f"diptych prepare {file} --what {' '.join(prepares)}{format}"] if prepares else []
    return [f"diptych check {file}", *made, f"diptych train {file} --out runs/{run}"]


def beside(path: str, kind: str, suffix: str) -> str:
    """Where what is made of a source goes: a folder beside its own, or beside its file."""
    return f"{path if kind == 'folder' else os.path.splitext(path)[0]}.{suffix}"


def _flow(value: Any) -> str:
    """A value as YAML in one line."""
    return (
        json.dumps(value, ensure_ascii=False)
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True).strip()
    )
