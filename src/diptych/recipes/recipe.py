"""What a recipe may say: dataclasses that YAML is read into, and where recipes are found.

A recipe is a system, its parts, and an ordered mapping of stages. `base` names another recipe whose values hold where
this one says nothing: mappings are merged, all else is replaced.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval

from diptych.core.errors import UserError, unknown
from diptych.core.image_sizes import AreaCap, SideRange, SizeRule
from diptych.core.ranges import Count, NotNegative, NotNegativeInt, Positive, Share
from diptych.core.sample import Task
from diptych.core.schema import Variants, read
from diptych.data.caption_file import CaptionFile
from diptych.data.filters import Filters
from diptych.data.loss_masks import LossMasks
from diptych.data.reading import CONTEXT_PIXELS
from diptych.data.variations import Variations
from diptych.inference.placement import Quantization
from diptych.inference.sampling import Sampling
from diptych.objectives.distillation import Distillation
from diptych.recipes.legacy import refuse_old
from diptych.recipes.plain import load_plain
from diptych.systems.bagel.config import BagelConfig
from diptych.systems.base import System
from diptych.systems.presets import ComposedConfig, HieraConfig, OmniGen2Settings, OvisU1Config
from diptych.training.config import Balance, OptimizerConfig, RunConfig, ScheduleConfig

Seed = Annotated[int, Interval(ge=0, lt=2**63)]


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Low-rank adapters: inner width, scale in units of it (the update is alpha / rank times B A; with `rslora`, alpha
    / sqrt(rank)), dropout of their input, and the last parts of the names of the layers that get one ("to_q",
    "to_out.0")."""

    rank: Count
    alpha: Positive
    targets: tuple[str, ...]
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        if not self.targets:
            raise UserError("targets names no layer")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a system: its `kind`, where its weights come from, and its configuration.

    weights: shipped name, folder, or hub id; None for random weights. A decoder of our own kinds (`mmdit`, `ovis_u1`)
    comes from a saved Diptych model that holds one. subfolder: inside it ("vae").
    config: sizes, read from the weights' own config where weights are given. tokenizer: of a backbone that starts from
    random weights ("toyworld" trains one on the toy world's texts; else a folder with tokenizer files).
    lora: adapters, of a decoder, of a backbone's language model, or of BAGEL's network; stages train them as `lora`.
    quantize: format of the frozen weights under adapters in training (`inference.placement.Quantization`; QLoRA).
    """

    kind: str
    weights: str | None = None
    subfolder: str | None = None
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    tokenizer: str | None = None
    lora: LoraSpec | None = None
    quantize: Quantization = "none"


@dataclass(frozen=True, kw_only=True)
class SystemSpec:
    """Stands for the kinds of systems."""

    kind: str


@dataclass(frozen=True, kw_only=True)
class BuiltSpec(SystemSpec, abc.ABC):
    """A specification that builds its system itself, in a file of its own; `VARIANTS` has its name."""

    @abc.abstractmethod
    def build(self, *, meta: bool, assets: Path | None) -> System:
        """Arguments as of `recipes.build.build_system`."""


@dataclass(frozen=True, kw_only=True)
class ComposedSpec(ComposedConfig):
    kind: Literal["composed"]
    backbone: Part
    conditioner: Part
    decoder: Part
    autoencoder: Part
    connector: Part = field(default_factory=lambda: Part(kind="identity"))
    refiner: Part | None = None
    pooler: Part | None = None
    sampling: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class HieraQuerySpec(HieraConfig, ComposedSpec):
    kind: Literal["hieraquery"]  # pyright: ignore[reportIncompatibleVariableOverride]


@dataclass(frozen=True, kw_only=True)
class OmniGen2Spec(OmniGen2Settings):
    kind: Literal["omnigen2"]
    backbone: Part
    decoder: Part
    autoencoder: Part
    sampling: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class OvisU1Spec(OvisU1Config):
    """pooler: CLIP's text encoder, for a refiner without a vector of its own (pool: none)."""

    kind: Literal["ovis_u1"]
    backbone: Part
    refiner: Part
    decoder: Part
    autoencoder: Part
    pooler: Part | None = None
    sampling: dict[str, Any] = field(default_factory=dict[str, Any])
    release: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class BagelSpec(BagelConfig):
    """network: a release by its `weights`, or `config`. init: plain models to start from, by part (`llm`, `vision`)."""

    kind: Literal["bagel"]
    network: Part
    autoencoder: Part
    init: dict[str, str] = field(default_factory=dict[str, str])
    sampling: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class MLLMSpec:
    kind: Literal["mllm"]
    backbone: Part


FILE_SOURCES = ("folder", "jsonl", "webdataset", "parquet")
"""Kinds of sources that read files."""
DRAWN_SOURCES = {
    "toyworld": "diptych.data.toyworld:ToyWorldSource",
}
"""Kinds of sources that draw their items, and where their class is, as module:name. It is called with `task`, `name`,
`count`, `seed`, `size` (side in pixels) and the recipe's `options`."""


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """A source of samples.

    control: captioned images are served as edits of maps of them (`data.control`: canny, depth, inpainting,
    outpainting). maps: folder of depth maps for control `depth`, named as a folder's images.

    task: what its samples are for. weight: its part of the mixture (the paper's mix ratio is the share of images).
    path: folder, file, pattern or URL. ignore: keys of JSONL rows that are passed over. split: of a parquet data set.
    columns: names of its columns by our names; of tar files, suffixes of members or keys of the .json. text: where
    captions stand, in tar files and in a folder's metadata (`data.captions.TextKeys`). captions: a second file that
    holds them, by key (`data.caption_file.CaptionFile`). filters: which items are used (`data.filters.Filters`).
    prepared: folder of what `diptych prepare` made of its items.
    repeats: how often each item is seen before the others are again, in place of `weight` where all sources have it.
    vary: what changes from visit to visit (`data.variations.Variations`). masks: pictures beside the images that say
    how much each place counts in the loss (`data.loss_masks.LossMasks`); None for none.
    count: of toy samples, 0 for endless; of pictures for proxies, 0 for all. seed: of the toy world, and of that draw.
    options: its others (`start`: first index, so that sets differ; and those of `ToyWorld`); of proxies, see
    `recipes.pictures`.
    """

    kind: str
    task: Task
    weight: NotNegative = 1.0
    path: str | None = None
    ignore: tuple[str, ...] = ()
    split: str | None = None
    columns: dict[str, str] = field(default_factory=dict[str, str])
    text: str | tuple[str, ...] | dict[str, float] | None = None
    captions: CaptionFile | None = None
    filters: Filters | None = None
    prepared: str | None = None
    control: str | None = None
    maps: str | None = None
    repeats: Count | None = None
    vary: Variations | None = None
    masks: LossMasks | None = None
    count: NotNegativeInt = 0
    seed: Seed = 0
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        kinds = [*FILE_SOURCES, *DRAWN_SOURCES, "proxies"]
        if self.kind not in kinds:
            raise unknown("kind", self.kind, kinds)


@dataclass(frozen=True, kw_only=True)
class OwnSize:
    """Targets keep their pictures' shapes. Either `longest` and `shortest` (BAGEL: `core.image_sizes.SideRange`), or
    `max_pixels` and `max_side` (OmniGen2: `AreaCap`)."""

    longest: int | None = None
    shortest: int | None = None
    max_pixels: int | None = None
    max_side: int | None = None

    def rule(self) -> SizeRule:
        """The rule; UserError where it is none of both, or half of one."""
        if self.longest is not None and self.shortest is not None and self.max_pixels is self.max_side is None:
            return SideRange(longest=self.longest, shortest=self.shortest)
        if self.max_pixels is not None and self.max_side is not None and self.longest is self.shortest is None:
            return AreaCap(max_pixels=self.max_pixels, max_side=self.max_side)
        raise UserError("data.own_size: needs longest and shortest, or max_pixels and max_side")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """sources: by name. size: side of the images in pixels, or [height, width].

    balanced: the shares hold in every batch, not only on average (`data.mixture.Mixture`).
    buckets: greatest aspect ratio of the buckets around `size`, None for one square bucket. fit: `crop`, `letterbox` or
    `stretch`. own_size: each target keeps its picture's shape, and `size` is that of drawn images and conversations.
    held_out: samples of each source kept for the held-out loss. max_bad_fraction: of unreadable items, above which a
    run stops.
    cache: folder for latents, None for none. decode, max_pixels, context_pixels: how files are read
    (`data.reading.Reading`).
    """

    sources: dict[str, SourceSpec]
    balanced: bool = False
    size: Count | tuple[Count, Count] = 512
    buckets: Annotated[float, Interval(ge=1, le=100)] | None = None
    own_size: OwnSize | None = None
    fit: Literal["crop", "letterbox", "stretch"] = "crop"
    held_out: NotNegativeInt = 0
    max_bad_fraction: Share = 0.01
    cache: str | None = None
    decode: Literal["exact", "draft", "fast"] = "draft"
    max_pixels: Count | None = None
    context_pixels: Count = CONTEXT_PIXELS

    def __post_init__(self) -> None:
        if self.cache == "":
            raise UserError("cache: names a folder, or is null")


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """A stage; see `training.config.StageConfig`.

    kind: what it learns from, its `data`, or what the model that the run starts from draws (`distill`; see
    `recipes.distilling`). distill: how that is done. settings: the system's options for this stage alone.
    """

    train: tuple[str, ...]
    steps: Count
    batch_size: Annotated[int, Interval(ge=1, le=2**20)]
    data: DataSpec
    kind: Literal["data", "distill"] = "data"
    distill: Distillation = field(default_factory=Distillation)
    micro_batch_size: Count | None = None
    loss_weights: dict[str, NotNegative] = field(default_factory=dict[str, float])
    balance: Balance = "samples"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    max_grad_norm: Positive = 1.0
    ema_decay: Annotated[float, Interval(gt=0, lt=1)] | None = None
    ema_warmup: bool = True
    settings: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.kind != "distill" and self.distill != Distillation():
            raise UserError("distill: has no effect in a stage that learns from its data; set kind: distill")


@dataclass(frozen=True, kw_only=True)
class SampleEdit:
    """An edit that a run draws on its way: the instruction, and the files of the images that it is of."""

    text: str
    images: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.text.strip() or not self.images:
            raise UserError("an edit needs text and images")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe. start: weights of the whole system to begin with (shipped name, run, folder or hub id;
    or OpenUni's published checkpoint as a .safetensors file).

    sample_prompts, sample_edits: drawn at the run's `sample_every`.
    """

    system: SystemSpec
    stages: dict[str, StageSpec]
    seed: Seed = 0
    start: str | None = None
    run: RunConfig = field(default_factory=RunConfig)
    sampling: Sampling = field(default_factory=Sampling)
    sample_prompts: tuple[str, ...] = ()
    sample_edits: tuple[SampleEdit, ...] = ()


VARIANTS: Mapping[type, Variants] = {
    SystemSpec: {
        "bagel": BagelSpec,
        "composed": ComposedSpec,
        "hieraquery": HieraQuerySpec,
        "mllm": MLLMSpec,
        "omnigen2": OmniGen2Spec,
        "ovis_u1": OvisU1Spec,
    }
}


def parse(plain: Mapping[str, Any], where: str = "") -> Recipe:
    """Plain values as a Recipe; UserError names what does not fit."""
    try:
        refuse_old(dict(plain))
        recipe: Recipe = read(Recipe, dict(plain), "", VARIANTS)
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from error
    if not recipe.stages:
        raise UserError(f"{where or 'recipe'}: no stages")
    return recipe


def load(name: str, overrides: Sequence[str] = ()) -> tuple[Recipe, dict[str, Any]]:
    """A recipe and its resolved plain values; without a system of its own it has that of its `start`."""
    from diptych.recipes.from_model import with_system  # which builds on this file

    plain = with_system(load_plain(name, overrides))
    return parse(plain, name), plain
