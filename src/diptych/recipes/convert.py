"""A published file of weights, pickle or safetensors, made a MODEL: so OpenUni and MetaQuery are released."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from diptych.checkpoints.pickles import to_safetensors
from diptych.checkpoints.streaming import entries
from diptych.checkpoints.tensors import PICKLES
from diptych.core.errors import UserError
from diptych.recipes.load import start
from diptych.recipes.recipe import Recipe
from diptych.recipes.run import save_model

PUBLISHED_PARTS = {
    "lmm.": "backbone",
    "model.mllm_backbone.": "backbone",
    "transformer.": "decoder",
    "model.transformer.": "decoder",
    "vae.": "autoencoder",
    "model.vae.": "autoencoder",
}
"""Beginnings of published names, by the part whose weights they are; others belong to queries and connector."""


def convert(source: Path, out: Path, recipe: Recipe | None) -> None:
    """Write the weights of a published file to `out`: a .safetensors file, or with a recipe a folder that is a MODEL.

    Args:
        recipe: one of the family (`iomm/openuni_l_finetune_mix`, `metaquery/sana`): its system and its sampling. Parts
            that the file leaves out stay referred to by their names.

    Raises:
        UserError: an unreadable file, weights that do not fit the recipe's system, or an `out` that exists.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; choose another name")
    if recipe is None:
        if out.suffix != ".safetensors":
            raise UserError(f"{out}: give --recipe for a folder that is a MODEL, or a name that ends in .safetensors")
        if source.suffix not in PICKLES:
            raise UserError(f"{source}: not a pickle ({', '.join(PICKLES)}); it needs no conversion")
        to_safetensors(source, out)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".diptych-", dir=out.parent) as folder:
        file = source
        if source.suffix in PICKLES:
            file = Path(folder) / "weights.safetensors"
            to_safetensors(source, file)
        try:
            system = start(dataclasses.replace(recipe, start=str(file)))
        except UserError as error:
            raise UserError(str(error).replace(str(file), str(source))) from error
        if not system.components:
            raise UserError(f"a recipe of kind {system.kind!r} starts from no file of weights")
        published = [entry.name for entry in entries(file)]
        for beginning, part in PUBLISHED_PARTS.items():
            if any(name.startswith(beginning) for name in published):  # the file's weights, no longer those of a name
                system.origins[part] = {**system.origins[part], "weights": None}
        save_model(system, recipe, out)
