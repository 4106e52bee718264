"""What prepared data must have been made from to be used in a stage, and sources that read them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from diptych.core.errors import UserError
from diptych.core.image_sizes import both_sides
from diptych.core.sample import Task
from diptych.data.buckets import buckets, places
from diptych.data.filters import SCORES
from diptych.data.latent_cache import autoencoder_fingerprint
from diptych.data.prepared_files import PreparedSet, check_whole, find_set, sets_in
from diptych.data.prepared_source import PreparedSource
from diptych.data.source import Listed, Source, size_table
from diptych.data.variations import Variations
from diptych.parts.autoencoders.base import Autoencoder
from diptych.parts.backbones.base import Backbone
from diptych.recipes.recipe import DataSpec, Recipe, SourceSpec
from diptych.systems.base import System
from diptych.systems.composed import ComposedSystem
from diptych.systems.presets import ComposedConfig
from diptych.systems.states import dropouts, varying

log = logging.getLogger(__name__)

MAX_LOSS = 0.5
"""Largest share of an image that the crop to its bucket may lose (`data.mixture.Mixture`)."""
STATE_SETTINGS = (
    *("layers", "prompt_skip", "condition", "mllm_images", "max_states", "prompt_tokens", "blank"),
    "too_long",
)
"""Options of a system that its condition's states depend on, beside prompts and pictures."""
VISION = ("vision", "projector")
"""Parts of an MLLM that make its vision tokens."""


class Needed:
    """What a stage's prepared data must have been made from.

    Args:
        system: with its starting weights and the options of the stage. data: of the stage. trained: parts that the
            stage or one before it trains. precision: of the run's forward passes.
    """

    def __init__(self, system: System, data: DataSpec, trained: tuple[str, ...] = (), precision: str = "fp32") -> None:
        self.system, self.data, self.trained, self.precision = system, data, trained, precision

    @cached_property
    def _autoencoder(self) -> str | None:
        autoencoder = getattr(self.system, "autoencoder", None)
        if not isinstance(autoencoder, Autoencoder):
            return None
        return autoencoder_fingerprint(autoencoder, {**autoencoder.plain_config(), **numbers_of(autoencoder)})

    @cached_property
    def _vision(self) -> Mapping[str, str] | None:
        backbone = getattr(self.system, "backbone", None)
        if not isinstance(backbone, Backbone) or not backbone.processor.sees_images:
            return None
        parts = backbone.named_parts()
        weights = {name: weights_digest(parts[name]) for name in VISION if name in parts}
        return {**weights, "preprocessing": self._preprocessing}

    @cached_property
    def _preprocessing(self) -> str:
        """A digest of what becomes of a picture before the vision tower."""
        backbone: Any = self.system.backbone  # type: ignore[attr-defined]
        probe = torch.linspace(-1, 1, 3 * 56 * 84).reshape(3, 56, 84)
        inputs = backbone.processor.pixels([probe])
        seen = hashlib.blake2b(inputs.values.contiguous().numpy().tobytes(), digest_size=16)
        seen.update(repr(inputs.grids).encode())
        return seen.hexdigest()

    @property
    def targets(self) -> dict[str, Any]:
        """How images become targets, but for their own sizes."""
        data, rule = self.data, self.data.own_size
        size: dict[str, Any] = {"size": list(both_sides(data.size))}
        if data.buckets is not None:
            size |= {"buckets": data.buckets, "step": self.system.image_step}
        if rule is not None:
            size |= {"own_size": json.loads(json.dumps(vars(rule))), "step": self.system.image_step}
        return {**size, "fit": data.fit, "decode": data.decode}

    def latents(self, task: Task) -> dict[str, Any] | None:
        """What latents are made from; None where the system or the task has none."""
        if task == "understand" or self._autoencoder is None:
            return None
        return {"autoencoder": self._autoencoder, "images": self.targets}

    def features(self, task: Task) -> dict[str, Any] | None:
        """What vision features are made from; None where the MLLM is shown no picture of such samples."""
        settings: Any = getattr(self.system, "options", None)
        shown = getattr(settings, "mllm_images", "kept") != "none"
        if self._vision is None or task == "text_to_image" or (task == "edit" and not shown):
            return None
        images = {"context_pixels": self.data.context_pixels, "decode": self.data.decode}
        if task != "understand":
            canvas = {name: getattr(settings, name, None) for name in ("canvas", "canvas_pixels", "read_pixels")}
            images = {**self.targets, **json.loads(json.dumps(canvas))}
        return {**self._vision, "task": task, "images": images}

    @cached_property
    def _reader(self) -> dict[str, str]:
        """Digests of what makes the condition's states."""
        system: Any = self.system
        parts = {"mllm": system.backbone, **({"conditioner": system.conditioner} if system.conditioner.count else {})}
        return {name: weights_digest(part) for name, part in parts.items()}

    def no_states(self, task: Task, vary: Variations | None) -> str | None:
        """Why no states can be kept of a task's samples, with the setting that it is for; None where they can."""
        system = self.system
        if not isinstance(system, ComposedSystem):
            return f"a system of kind {system.kind} has no states of a prompt that it draws from"
        if task == "understand":
            return "task understand learns the MLLM's words, and draws nothing"
        parts = system.named_parts()
        for name in self.trained:
            learned = set(parts[name].parameters())
            if not learned.isdisjoint(system.backbone.parameters()):
                return f"the recipe trains {name!r} of the MLLM here or in an earlier stage; take it out of train"
            if system.conditioner.count and not learned.isdisjoint(system.conditioner.parameters()):
                return (
                    f"the recipe trains {name!r} here or in an earlier stage, queries that run through the MLLM, so "
                    "that its states change with every step; take it out of train"
                )
        if vary is not None and vary.shuffle_tags:
            return "vary.shuffle_tags gives a caption too many forms; leave it out"
        return varying(system.options, task)

    def states(self, task: Task, vary: Variations | None = None) -> dict[str, Any] | None:
        """What the states of a condition are made from; None where there is a reason not to keep them."""
        if self.no_states(task, vary) is not None:
            return None
        system: Any = self.system
        config: ComposedConfig = system.options
        prompts = {name: value for name, value in vars(config.prompts).items() if name != "expansion"}
        settings = {name: getattr(config, name) for name in STATE_SETTINGS}
        made: dict[str, Any] = {
            **self._reader,
            "precision": self.precision,
            "task": task,
            "prompts": prompts,
            "settings": settings,
            "dropped": dropouts(config.dropout),
        }
        if vary is not None:
            made["vary"] = {"trigger": vary.trigger, "lines": vary.lines, "without": vary.caption_dropout > 0}
        shows = task == "image" or (task == "edit" and config.mllm_images != "none") or config.blank
        if shows and system.backbone.processor.sees_images:
            canvas = {name: getattr(config, name) for name in ("canvas", "canvas_pixels", "read_pixels")}
            made["shown"] = {"preprocessing": self._preprocessing, **self.targets, **canvas}
        return json.loads(json.dumps(made))

    def sizes_of(self, source: Source) -> np.ndarray:
        """(height, width) of each item's target, (N, 2); zeros where a stage leaves the item out.

        Raises:
            UserError: sizes are by buckets and the source has none (drawn images).
        """
        data = self.data
        square = both_sides(data.size)
        if source.task == "understand" or (data.buckets is None and data.own_size is None):
            return np.tile(np.array(square, np.int64), (len(source), 1))
        sizes = source.sizes()
        if sizes is None:
            raise UserError(f"{source.name}: its items have no sizes, so that it has no buckets of its own")
        table = size_table(sizes).astype(np.int64)
        if data.own_size is not None:
            rule, step = data.own_size.rule(), self.system.image_step
            made = [rule.fit(h, w, step) if h and w else square for h, w in table.tolist()]
            return np.array(made, np.int64).reshape(-1, 2)
        assert isinstance(data.size, int)
        assert data.buckets is not None
        listed = buckets(data.size, self.system.image_step, data.buckets)
        place = places(table, listed, MAX_LOSS)
        chosen = np.array([*listed, (0, 0), (0, 0)], np.int64)[place]  # the last two: -1 left out, -2 unreadable
        chosen[place == -2] = listed[0]  # loading it in the first bucket says why
        return chosen

    def pixels(self, task: Task, sets: Mapping[str, PreparedSet]) -> bool:
        """Whether targets have to be decoded although their latents are known."""
        settings: Any = getattr(self.system, "options", None)
        aligned = getattr(settings, "alignment", None) is not None and not (task == "image" and "features" in sets)
        if "latents" not in sets or self.system.scales or aligned:
            return True
        return task == "image" and not {"features", "states"} & set(sets)


def needed_by(recipe: Recipe, stage: str, system: System) -> Needed:
    """What a stage needs of prepared data: it and the stages before it may have trained the models that made them."""
    upto = list(recipe.stages).index(stage) + 1
    trained = tuple(part for spec in list(recipe.stages.values())[:upto] for part in spec.train)
    return Needed(system, recipe.stages[stage].data, trained, recipe.run.precision)


def useful_kinds(needed: Needed, task: Task, vary: Variations | None = None) -> tuple[str, ...]:
    """What of a task's items stays the same in every visit and is worth keeping; without reading weights."""
    kinds: list[str] = []
    autoencoder = getattr(needed.system, "autoencoder", None)
    if task != "understand" and isinstance(autoencoder, Autoencoder) and any(True for _ in autoencoder.parameters()):
        kinds.append("latents")  # of pixels themselves, nothing is saved
    if needed.no_states(task, vary) is None:
        kinds.append("states")
    return tuple(kinds)


def numbers_of(autoencoder: Autoencoder) -> dict[str, Any]:
    """What is beside its weights and configuration: scale and shift of the latents."""
    return {
        name: getattr(autoencoder, name)
        for name in ("scale", "shift")
        if isinstance(getattr(autoencoder, name, None), float)
    }


def weights_digest(part: nn.Module) -> str:
    """A digest of every weight and buffer."""
    digest = hashlib.blake2b(type(part).__qualname__.encode(), digest_size=16)
    for name, tensor in sorted(part.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        whole: Any = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        digest.update(whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def with_prepared(source: Any, spec: SourceSpec, needed: Needed | None) -> Source:
    """A file source with what was prepared of its items.

    Args:
        needed: what latents and features must have been made from; without it, only scores and sizes are read.

    Raises:
        UserError: nothing was prepared there, or only for other weights, sizes, settings or items.
    """
    assert spec.prepared is not None
    root = Path(spec.prepared).expanduser()
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder of prepared data; make it with diptych prepare, or leave out `prepared`"
        )
    sets = {kind: made for kind in ("sizes", *SCORES) if (made := table_of(root, kind, source)) is not None}
    if needed is not None:
        if (why := needed.no_states(spec.task, spec.vary)) is not None and (old := sets_in(root, "states")):
            raise UserError(f"{root}: states were prepared, but {why}, or remove {old[0].folder}")
        wanted = {
            "latents": needed.latents(spec.task),
            "features": needed.features(spec.task),
            "states": needed.states(spec.task, spec.vary) if sets_in(root, "states") else None,
        }
        for kind, made_from in wanted.items():
            made = None if made_from is None else find_set(root, kind, made_from, len(source))
            if made is not None:
                sets[kind] = made
        if "features" in sets and (trained := [part for part in VISION if part in needed.trained]):
            raise UserError(
                f"{root}: features were prepared, but the recipe trains {trained[0]!r} here or in an earlier "
                f"stage, which changes them; remove {sets['features'].folder}, or train other parts"
            )
        if not sets:
            raise UserError(f"{root}: holds nothing prepared for this source; run diptych prepare for this recipe")
        if {"latents", "features", "states"} & set(sets):
            pixels = needed.pixels(spec.task, sets)
            source.reading = replace(source.reading, digests=True, targets=pixels)
    for kind, made in sets.items():
        log.info("%s: %s of %d items from %s", source.name, kind, made.manifest.items, made.folder)
    return PreparedSource(source, sets, spec.task)


def refuse_mixed_states(data: DataSpec, where: str) -> None:
    """UserError where sources of one task have prepared states and others have none: processes of a sharded run would
    wait for each other in the MLLM."""
    has: dict[str, bool] = {}
    for name, spec in data.sources.items():
        root = None if spec.prepared is None else Path(spec.prepared).expanduser()
        known = root is not None and bool(sets_in(root, "states"))
        if has.setdefault(spec.task, known) != known:
            raise UserError(
                f"{where}.{name}: of the sources of task {spec.task} some have prepared states and others have none, "
                "which a sharded run cannot mix; prepare states for all of them, or for none"
            )


def prepared_lines(name: str, spec: SourceSpec) -> list[str]:
    """What lies in a source's folder of prepared data, a line for each set; whether it fits, a run says."""
    if spec.prepared is None:
        return []
    root = Path(spec.prepared).expanduser()
    lines: list[str] = []
    for kind in ("latents", "features", "states", "sizes", *SCORES):
        for made in sets_in(root, kind):
            missing = len(made.missing())
            whole = f"{missing:,} of {made.manifest.shards:,} shards are missing" if missing else "whole"
            lines.append(f"{name}: prepared {kind} of {made.manifest.items:,} items, {whole}, in {made.folder}")
    return lines or [f"{name}: nothing prepared in {root}"]


def table_of(root: Path, kind: str, source: Source) -> PreparedSet | None:
    """The scores or sizes of a source's items; None where none were made.

    Raises:
        UserError: they are of other items, or of files that have changed since; or two models made such scores.
    """
    sets = sets_in(root, kind)
    if not sets:
        return None
    if len(sets) > 1:
        models = " and ".join(str(made.manifest.made_from.get("model")) for made in sets)
        raise UserError(f"{root}: holds {kind} twice ({models}); remove the folder of one of them")
    [made] = sets
    check_whole(made)
    identity = source.identity() if isinstance(source, Listed) else None
    if made.manifest.items != len(source) or made.identities() != {str(identity)}:
        raise UserError(
            f"{made.folder}: {source.name} has changed since its {kind} were made; run diptych prepare again, which "
            "makes those of the files that changed"
        )
    return made
