"""How images are sampled: the settings that a recipe, a saved model, a command and a call have in common."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Interval, Le

from diptych.core.errors import UserError, unknown
from diptych.core.ranges import check_ranges
from diptych.inference.bagel_guidance import BagelGuidance
from diptych.inference.caching import threshold_of
from diptych.inference.guidance import ALWAYS, ChainGuidance, Guidance, OmniGen2Guidance, QwenImageGuidance
from diptych.inference.solvers import SOLVERS, Solver, make_solver
from diptych.objectives.flow_matching import resolution_shift, root_shift

GUIDANCES: dict[str, type[Guidance]] = {
    "bagel": BagelGuidance,
    "chain": ChainGuidance,
    "omnigen2": OmniGen2Guidance,
    "qwen_image": QwenImageGuidance,
}
FILLED = ("text", "images", "during", "patch")
"""Fields of guidance objects that come from other settings and from the model."""

Side = Annotated[int, Interval(ge=1, le=16384)]
"""Pixels."""
Shift = float | Literal["root", "flux", "qwen_image"]


SHIFTS = ("root", "flux", "qwen_image")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are sampled; a model's folder may carry its own defaults.

    size: (height, width) in pixels; some systems give edits the shape of their image where none is asked for. steps:
    solver steps. cfg: text guidance scale, 1 for none. image_cfg: image guidance scale in editing, 1 for text guidance
    alone. guidance: which requests these scales compare and how, by its kind ("chain"), or a mapping of `kind` and its
    options ({"kind": "bagel", "interval": [0.4, 1.0], "renorm": "global"}); see `GUIDANCES`. cfg_range: steps that are
    guided, first and last as shares of all steps. negative: the text that guidance leads away from.
    timestep_shift: of the times; "root" (OmniGen2's), "flux" and "qwen_image" go by the latent's size. shift_terminal:
    the time that the last step begins at, 0 for what the grid gives. solver: see `inference.solvers`. cache:
    how wrong a velocity may be that is derived from those of earlier steps instead of computed ("safe", "fast", or the
    threshold itself; see `inference.caching`). cache_order: 0 repeats the last velocity, 1 draws a line through the
    last two, and so on. batch_size: images per decoder run (each takes as many rows as guidance has branches).
    prompt_expansion: tokens that a model may write before each image about what is to be in it (BAGEL's thinking), 0
    for none; prompt_expansion_temperature: at which they are drawn, 0 for the likeliest. edit: other values of these
    fields for edits.
    """

    size: tuple[Side, Side] = (512, 512)
    steps: Annotated[int, Le(100_000)] = 25
    cfg: float = 4.0
    image_cfg: float = 1.0
    guidance: str | dict[str, Any] = "chain"
    cfg_range: tuple[float, float] = ALWAYS
    negative: str = ""
    timestep_shift: Shift = 1.0
    shift_terminal: float = 0.0
    solver: str = "euler"
    cache: float | Literal["off", "safe", "fast"] = "off"
    cache_order: Annotated[int, Interval(ge=0, le=3)] = 0
    batch_size: int = 16
    prompt_expansion: int = 0
    prompt_expansion_temperature: float = 0.0
    edit: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, not {self.steps}")
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.cfg < 0 or self.image_cfg < 0:
            raise UserError(f"guidance scales must not be negative (cfg {self.cfg}, image_cfg {self.image_cfg})")
        shift = self.timestep_shift
        if shift not in SHIFTS and (isinstance(shift, str) or shift <= 0):
            raise UserError(f"timestep_shift must be above 0, or 'root', 'flux' or 'qwen_image', not {shift!r}")
        if not 0 <= self.shift_terminal < 1:
            raise UserError(f"shift_terminal must be from 0 to below 1, not {self.shift_terminal}")
        object.__setattr__(self, "cfg_range", tuple(self.cfg_range))
        if len(self.cfg_range) != 2 or not 0 <= self.cfg_range[0] <= self.cfg_range[1] <= 1:
            raise UserError(f"cfg_range must be two rising shares of the steps from 0 to 1, not {self.cfg_range}")
        if self.solver not in SOLVERS:
            raise unknown("solver", self.solver, SOLVERS)
        if self.solver == "dpmpp_2m" and self.shift_terminal:
            raise UserError("shift_terminal does not go with solver 'dpmpp_2m', whose times end at 0")
        threshold_of(self.cache)
        self.guide()
        if self.prompt_expansion < 0:
            raise UserError(f"prompt_expansion must not be negative, not {self.prompt_expansion}")
        if not 0 <= self.prompt_expansion_temperature < float("inf"):
            raise UserError(
                f"prompt_expansion_temperature must not be negative, not {self.prompt_expansion_temperature}"
            )
        for name in self.edit:
            if name == "edit" or name not in names():
                raise unknown("option", name, names(), "edit")
        if self.edit:
            self.over(self.edit)

    def over(self, values: Mapping[str, Any]) -> Sampling:
        """These settings with `values` in their place; `size` may be one number, and options of the same kind of
        guidance are merged.

        Raises:
            UserError: a name or a value that does not fit.
        """
        changes = dict(values)
        for name in changes:
            if name not in names() or name == "edit":
                raise unknown("option", name, names())
        for name, value in changes.items():
            check_kind(name, value)
        if "size" in changes:
            size = changes["size"]
            sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, tuple | list) else ()
            if len(sides) != 2 or not all(isinstance(side, int) and side > 0 and side is not True for side in sides):
                raise UserError(f"size must be one or two whole numbers above 0, not {size!r}")
            changes["size"] = sides
        if "guidance" in changes:
            if not isinstance(changes["guidance"], str | Mapping):
                raise UserError(f"guidance must be a kind, or a mapping of it, not {changes['guidance']!r}")
            before, after = as_mapping(self.guidance), as_mapping(changes["guidance"], kind=None)
            same = after.get("kind", before["kind"]) == before["kind"]
            changes["guidance"] = {**before, **after} if same else after
        try:
            return replace(self, edit={}, **changes)
        except TypeError as error:
            raise UserError(f"{', '.join(changes)}: a value is of the wrong type ({error})") from error

    def guide(self, during: tuple[float, float] = ALWAYS, patch: int = 1) -> Guidance:
        """The guidance that these settings ask for.

        Args:
            during: least and greatest time of the steps that `cfg_range` chooses. patch: side of a token in latent
                pixels.
        """
        options = as_mapping(self.guidance)
        kind = options.pop("kind")
        if kind not in GUIDANCES:
            raise unknown("guidance", str(kind), GUIDANCES)
        cls = GUIDANCES[kind]
        known = [row.name for row in fields(cls)]
        for name in options:
            if name not in known or name in FILLED:
                raise unknown("option", name, [row for row in known if row not in FILLED], f"guidance {kind!r}")
        if "during" not in known and self.cfg_range != ALWAYS:
            raise UserError(f"cfg_range does not go with guidance {kind!r}; it has 'interval'")
        given = {"text": self.cfg, "images": self.image_cfg, "during": during, "patch": patch}
        try:
            return cls(**{name: value for name, value in given.items() if name in known}, **options)
        except TypeError as error:
            raise UserError(f"guidance {kind!r}: a value is of the wrong type ({options})") from error

    def solver_at(self, tokens: int) -> Solver:
        """The solver for an image of this many tokens of 2x2 latent pixels."""
        shift, dynamic = shift_at(self.timestep_shift, tokens), isinstance(self.timestep_shift, str)
        return make_solver(self.solver, self.steps, shift, self.shift_terminal, dynamic=dynamic)


def check_kind(name: str, value: Any) -> None:
    """UserError for a setting that is a number or a text and is given something else."""
    kind = kinds()[name]
    if kind in (int, float):
        whole = "whole " if kind is int else ""
        if isinstance(value, bool) or not isinstance(value, numbers.Integral if kind is int else numbers.Real):
            raise UserError(f"{name} must be a {whole}number, not {value!r}")
    elif kind is str and name != "solver" and not isinstance(value, str):  # that one lists its choices
        raise UserError(f"{name} must be a text, not {value!r}")


@functools.cache
def kinds() -> dict[str, Any]:
    """Types of the settings, without their ranges."""
    return get_type_hints(Sampling)


def names() -> list[str]:
    """Names of the settings."""
    return [row.name for row in dataclasses.fields(Sampling)]


def as_mapping(guidance: str | Mapping[str, Any], kind: str | None = "chain") -> dict[str, Any]:
    """A guidance as a mapping; `kind` is what it has where it does not say."""
    if isinstance(guidance, str):
        return {"kind": guidance}
    return {**({} if kind is None else {"kind": kind}), **guidance}


def shift_at(shift: Shift, tokens: int) -> float:
    """The shift of the times for an image of this many tokens of 2x2 latent pixels."""
    if shift == "root":
        return root_shift(tokens)
    if shift == "qwen_image":
        return resolution_shift(tokens, top=0.9, high=8192)
    return resolution_shift(tokens) if shift == "flux" else shift


RENAMED = {
    "shift": "timestep_shift",
    "method": "solver",
    "think": "prompt_expansion",
    "think_temperature": "prompt_expansion_temperature",
}
"""Settings in folders of the older form, by today's names."""

BAGEL_ONLY = {"cfg_interval": "interval", "renorm": "renorm", "renorm_min": "renorm_min"}
"""Settings of the older form that are options of guidance "bagel" today."""


def from_legacy(values: Mapping[str, Any], guidance: str = "chain") -> dict[str, Any]:
    """Settings as a folder of the older form has them, in today's form; those of today's form stay as they are.

    Args:
        guidance: the kind where the settings do not say (those of `edit` belong to the model's).
    """
    made = {RENAMED.get(name, name): value for name, value in values.items() if name not in (*BAGEL_ONLY, "edit")}
    kind = as_mapping(made.get("guidance", guidance))["kind"]
    options = {BAGEL_ONLY[name]: value for name, value in values.items() if name in BAGEL_ONLY}
    if options and kind == "bagel":
        made["guidance"] = {**as_mapping(made.get("guidance", guidance)), **options}
    if values.get("edit"):
        made["edit"] = from_legacy(values["edit"], kind)
    return made
