"""What a MODEL will refuse of a request, said by its configuration alone, before its weights are fetched or read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diptych.core.errors import UserError
from diptych.core.schema import read
from diptych.inference.engine import Engine
from diptych.inference.sampling import Sampling
from diptych.inference.scales import views
from diptych.recipes.build import build_system
from diptych.recipes.from_model import system_of
from diptych.recipes.names import locate_configs, shipped
from diptych.recipes.recipe import VARIANTS, SystemSpec
from diptych.training import state


def refuse_early(model: str, requests: Sequence[Mapping[str, Any]], *, edits: bool = False) -> None:
    """UserError for options of `Engine.generate` or `edit` that a MODEL does not take.

    Shipped models and runs that have not ended are not looked at: they are read in a moment, or say it themselves.
    """
    asked = [dict(request) for request in requests if request]
    if not asked or model in shipped():
        return
    folder = locate_configs(model)
    if state.is_checkpoint(folder) or ((folder / "checkpoints").is_dir() and not (folder / "model").is_dir()):
        return
    plain, sampling, _ = system_of(model)
    spec: Any = read(SystemSpec, plain, model, VARIANTS)
    engine = Engine(build_system(spec, meta=True), read(Sampling, sampling, f"{model}: sampling"), model)
    for options in asked:
        scales = options.pop("scales", None) or "last"
        settings = engine.settings(options, edits=edits)
        if settings.prompt_expansion and not engine.system.expands:
            raise UserError(f"{model}: this model cannot expand prompts; leave prompt_expansion at 0")
        if not edits or "size" in options:  # else the image has its say
            for view in views(engine.system, settings.size, scales):
                engine.plan(view, settings)
