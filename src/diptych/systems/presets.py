"""What a conditioned system does with its parts, and the presets of it that papers and releases name.

`ComposedConfig` has every option. A preset is a few options under the names of its own paper; `common` turns them into
a `ComposedConfig`, which is all that the system reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.ranges import Count, NotNegativeInt, Share
from diptych.core.sample import IMAGE_PLACEHOLDER
from diptych.objectives import masked_image
from diptych.objectives.flow_matching import FlowMatching
from diptych.parts.decoders.routing import TokenRoute
from diptych.systems.prompts import Prompts

Dropped = Literal["text", "images", "text_and_images"]
"""What guidance, and training for it, removes from a request: its text, its context images, or both."""


@dataclass(frozen=True, kw_only=True)
class ConditionDropout:
    """Shares of training samples that lose their text, or text and images, so that guidance has something to compare.

    own_draw: whether a number of its own says which of the two a sample loses (OmniGen2's release).
    """

    text: float = 0.0
    text_and_images: float = 0.0
    own_draw: bool = False

    def of(self, draws: Draws) -> Dropped | None:
        """What the one sample of these draws loses."""
        total = self.text + self.text_and_images
        u = float(draws.uniform("drop")[0])
        if u >= total:
            return None
        v = float(draws.uniform("drop_references")[0]) if self.own_draw else u / total
        return "text_and_images" if v < self.text_and_images / total else "text"


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Representation alignment (REPA, Yu et al. 2024, arXiv 2410.06940; HieraQuery, Sec. 3.2, at several scales).

    layer: the decoder's block whose states are aligned, from 1 (REPA: 8 of 28 blocks; HieraQuery names none, and 8 for
    SD3 and 10 for SANA are ours). hidden: inner width of the projector.
    """

    layer: int
    hidden: Count = 2048


ROUTED_BLOCKS = (2, -2)
"""First and last block that routed tokens skip by default: all but the first and the last of a decoder."""


@dataclass(frozen=True, kw_only=True)
class TokenRouting:
    """Image tokens that skip blocks of the decoder in training (TREAD, Krause et al. 2025, arXiv 2501.04765).

    share: of each image's tokens, drawn anew for each sample and step. first, last: the blocks that they skip, both
    included, from 1, or from -1 for the last one backwards.
    """

    share: Share
    first: int = ROUTED_BLOCKS[0]
    last: int = ROUTED_BLOCKS[1]

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise UserError(f"token_routing: share {self.share} must be at least 0 and below 1")

    def blocks(self, depth: int) -> tuple[int, int]:
        """First and last skipped block, from 1, of a decoder of `depth` blocks."""
        first, last = (number if number > 0 else depth + 1 + number for number in (self.first, self.last))
        return first, last

    def route(self, draws: Draws, counts: Sequence[int], depth: int) -> TokenRoute | None:
        """Which tokens skip which blocks of a decoder of `depth` blocks, drawn for each sample; None where none do.

        Images of one size lose equally many, round(share N) of N, and keep one at least.

        Args:
            counts: image tokens of each sample.
        """
        if self.share == 0:
            return None
        sizes = [max(1, count - round(self.share * count)) for count in counts]
        first, last = self.blocks(depth)
        return TokenRoute(first=first, last=last, kept=tuple(draws.places("token_routing", counts, sizes)))


@dataclass(frozen=True, kw_only=True)
class ComposedConfig:
    """What a system of an MLLM, a conditioner, a connector and a decoder does with them.

    prompts: user turns by task.
    prompt_skip: first states of each prompt that the decoder does not see (Qwen-Image drops its 34 template tokens).
    condition: which last hidden states the decoder sees: those of the whole sequence (the paper) or of the queries.
    layers: last layers of the MLLM whose states are taken, side by side.
    flow: what the decoder's output means, and the times of training.
    mask_ratio: r, share of the image tokens hidden in training (IOMM, Sec. 3.4; tables 4-6).
    mask_mode: how they are hidden.
    cfg_dropout: share of training samples whose whole condition is replaced by the null prompt, for guidance.
    cfg_dropout_text: share of those that lose their text alone.
    mllm_images: what the MLLM is shown of context images: `none`; `dropped`: it reads them, and their states are left
        out; `kept`: they stay in.
    reference_latents: whether the decoder reads latents of the context images.
    max_pixels: greatest area of such an image; a larger one is made smaller, and sides are cut to whole patches.
    max_states: most states of a prompt that the decoder sees; of a longer one the last (SGT's release: 896). None for
        all.
    prompt_tokens: most tokens of a caption or an instruction; a longer one is cut, with a warning that names the sample
        (OpenUni's release: 128, MetaQuery's: 256). None for all.
    canvas: instead of that, context images are fitted to sides that are multiples of this, of an area within
        `canvas_pixels`, and edits have the shape of their image; None for no such fitting.
    read_pixels: area that images on a canvas are brought to before the MLLM's own resizing; None for that alone.
    blank: whether a prompt without images shows a white one.
    pack: tokens of a row into which texts are packed in training, 0 for padded rows.
    too_long: what becomes of conversations longer than the MLLM takes: an `error`, or they are `cut`: to their first
        tokens in training, prompts to their last.
    alignment: of the decoder's states to the MLLM's vision features of the image to make; None for none.
    token_routing: image tokens that skip blocks of the decoder in training; None for none.
    """

    prompts: Prompts = field(default_factory=Prompts)
    prompt_skip: NotNegativeInt = 0
    condition: Literal["all", "queries"] = "all"
    layers: Count = 1
    flow: FlowMatching = field(default_factory=FlowMatching)
    mask_ratio: Share = 0.0
    mask_mode: masked_image.Way = "zero"
    cfg_dropout: Share = 0.1
    cfg_dropout_text: Share = 0.0
    mllm_images: Literal["none", "dropped", "kept"] = "kept"
    reference_latents: bool = False
    max_pixels: Count = 1024 * 1024
    max_states: Count | None = None
    prompt_tokens: Count | None = None
    canvas: int | None = None
    canvas_pixels: tuple[int, int] = (3136, 1003520)
    read_pixels: tuple[int, int] | None = None
    blank: bool = False
    pack: NotNegativeInt = 0
    too_long: Literal["error", "cut"] = "error"
    alignment: Alignment | None = None
    token_routing: TokenRouting | None = None

    def __post_init__(self) -> None:
        if self.condition == "queries" and self.max_states is not None:
            raise UserError("max_states has no effect where the decoder sees queries alone; leave it out")
        object.__setattr__(self, "canvas_pixels", tuple(self.canvas_pixels))
        if self.read_pixels is not None:
            object.__setattr__(self, "read_pixels", tuple(self.read_pixels))
        if self.layers < 1:
            raise UserError(f"layers must be at least 1, not {self.layers}")
        check_shares("cfg_dropout", self.cfg_dropout, "cfg_dropout_text", self.cfg_dropout_text)
        if self.read_pixels is not None and self.canvas is None:
            raise UserError("read_pixels goes with a canvas; set canvas, or leave read_pixels out")

    def common(self) -> ComposedConfig:
        """Every option."""
        return self

    @property
    def dropout(self) -> ConditionDropout:
        return ConditionDropout(text=self.cfg_dropout_text, text_and_images=self.cfg_dropout)


def check_shares(first: str, a: float, second: str, b: float) -> None:
    """UserError for two shares of the same samples that are none together."""
    if not (a >= 0 and b >= 0 and a + b <= 1):
        raise UserError(f"{first} {a} and {second} {b} are shares, at most 1 together")


@dataclass(frozen=True, kw_only=True)
class HieraConfig(ComposedConfig):
    """HieraQuery (Sec. 3): queries at several scales, an image of its own resolution from each.

    scale_condition: the condition of a scale: its own queries' (as the paper's figure and Ming-Lite-Uni's release) or
    those of all scales up to it.
    scale_rounding: the images of the smaller scales: `exact` shares s_k / s_K of the last one's sides, or `smart`,
    rounded to whole patches (Qwen2.5-VL's smart resize; for aspect-ratio buckets with fine steps).
    shared_timestep: one time for all scales of a sample, which packs them into one pass; otherwise each has its own.
    """

    condition: Literal["all", "queries"] = "queries"
    scale_condition: Literal["own", "cumulative"] = "own"
    scale_rounding: Literal["exact", "smart"] = "exact"
    shared_timestep: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.condition != "queries" or self.prompt_skip:
            raise UserError("hieraquery: its decoder sees queries alone; leave out 'condition' and 'prompt_skip'")


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(ComposedConfig):
    """A preset's options as a `ComposedConfig`.

    own_draw: as of `ConditionDropout`. edits_fit: whether an edit of one image has the size at which the decoder reads
    that image's latents.
    """

    own_draw: bool = False
    edits_fit: bool = False

    @property
    def dropout(self) -> ConditionDropout:
        dropout = super().dropout
        return ConditionDropout(text=dropout.text, text_and_images=dropout.text_and_images, own_draw=self.own_draw)


@dataclass(frozen=True, kw_only=True)
class OmniGen2Settings:
    """OmniGen2 (arXiv 2506.18871); the defaults are those of the released pipelines and fine-tuning.

    prompt: the user turn; `{text}` is the caption or instruction. edit_prompt: that of edits, where it is another.
    assistant_prefix: what an assistant's turn begins with that follows it; "", as released, for no such turn.
    assistant_turn: `prefixed`, or `open` for a turn that is opened without a prefix too, as SGT's release does.
    max_states: as of `ComposedConfig`.
    expansion: as of `Prompts`.
    system: the system prompt, "" for none. system_dropped: the one of prompts that training drops.
    mllm_images: what the MLLM is shown of reference images: `none` (the released editing pipeline), `dropped`: it reads
    them, and their states are left out (the released chat pipeline), `kept`: they stay in (SGT's training).
    reference_latents: whether the decoder reads the latents of reference images.
    max_pixels: greatest area of a reference image; a larger one is made smaller, and sides are cut to whole patches.
    flow: what the decoder's output means, the times of training (the release's first version shifts them by `flux`, its
    second, as in sampling, by `root`), and that images count by the elements of their latents.
    cfg_dropout: share of training samples whose prompt is dropped; cfg_dropout_images: share of those whose reference
    images go too.
    alignment, token_routing: as of `ComposedConfig`.
    """

    prompt: str = "{text}"
    edit_prompt: str = ""
    assistant_prefix: str = ""
    assistant_turn: Literal["prefixed", "open"] = "prefixed"
    expansion: str = ""
    system: str = "You are a helpful assistant that generates high-quality images based on user instructions."
    system_dropped: str = "You are a helpful assistant that generates images."
    mllm_images: Literal["none", "dropped", "kept"] = "none"
    reference_latents: bool = True
    max_pixels: int = 1024 * 1024
    max_states: Count | None = None
    flow: FlowMatching = field(default_factory=lambda: FlowMatching(timestep_shift="flux", weighting="element"))
    cfg_dropout: Share = 1e-4
    cfg_dropout_images: Share = 0.5
    alignment: Alignment | None = None
    token_routing: TokenRouting | None = None

    def common(self) -> ComposedConfig:
        """Every option."""
        prompts = Prompts(
            text_to_image=self.prompt,
            image="",
            edit=self.edit_prompt or self.prompt,
            null="",
            system=self.system,
            system_dropped=self.system_dropped,
            assistant_prefix=self.assistant_prefix,
            assistant_turn=self.assistant_turn,
            expansion=self.expansion,
        )
        return ResolvedConfig(
            prompts=prompts,
            flow=self.flow,
            cfg_dropout=self.cfg_dropout * self.cfg_dropout_images,
            cfg_dropout_text=self.cfg_dropout * (1 - self.cfg_dropout_images),
            own_draw=True,
            edits_fit=True,
            mllm_images=self.mllm_images,
            reference_latents=self.reference_latents,
            max_pixels=self.max_pixels,
            max_states=self.max_states,
            alignment=self.alignment,
            token_routing=self.token_routing,
        )


DESCRIBE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, and spatial relationships of the "
    "objects:"
)


@dataclass(frozen=True, kw_only=True)
class OvisPrompts(Prompts):
    """Ovis-U1's words; its assistant's turn, where there is one, is said whole and its states part of the condition."""

    text_to_image: str = f"{IMAGE_PLACEHOLDER}\n{DESCRIBE}{{text}}"
    image: str = ""
    edit: str = f"{IMAGE_PLACEHOLDER}\n{{text}}"
    null: str = f"{IMAGE_PLACEHOLDER}\nGenerate an image."
    assistant_turn: Literal["open", "prefixed", "closed"] = "closed"


@dataclass(frozen=True, kw_only=True)
class OvisU1Config:
    """Ovis-U1 (Sec. 2 and 3): text-to-image prompts show a white image, so that every prompt has one; edits have the
    shape of their image.

    layers: last layers of the MLLM whose states are the raw condition, side by side (table 9: V1 has one, V2 two).
    blank: whether a prompt without images shows a white one; without, it is text alone.
    canvas: context images are fitted to sides that are multiples of this, of an area within `canvas_pixels`.
    read_pixels: area that they are brought to before the MLLM's own resizing; None for that alone.
    reference_latents: whether the decoder reads latents of the context images.
    cfg_dropout_text, cfg_dropout_all: share of training samples that lose their text, and text and images, for
    guidance.
    flow: what the decoder's output means, and the times of training.
    pack: tokens of a row into which texts are packed in training, 0 for padded rows.
    too_long: what becomes of conversations longer than the MLLM takes: an `error`, or they are `cut` as the reference
    cuts them: to their first tokens in training, prompts to their last.
    alignment, token_routing: as of `ComposedConfig`.
    """

    prompts: OvisPrompts = field(default_factory=OvisPrompts)
    layers: int = 2
    blank: bool = True
    canvas: int = 32
    canvas_pixels: tuple[int, int] = (3136, 1003520)
    read_pixels: tuple[int, int] | None = (3136, 448 * 448)
    reference_latents: bool = True
    cfg_dropout_text: Share = 0.1
    cfg_dropout_all: Share = 0.1
    flow: FlowMatching = field(default_factory=FlowMatching)
    pack: NotNegativeInt = 0
    too_long: Literal["error", "cut"] = "error"
    alignment: Alignment | None = None
    token_routing: TokenRouting | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "canvas_pixels", tuple(self.canvas_pixels))
        if self.read_pixels is not None:
            object.__setattr__(self, "read_pixels", tuple(self.read_pixels))
        if self.layers < 1:
            raise UserError(f"layers must be at least 1, not {self.layers}")
        check_shares("cfg_dropout_text", self.cfg_dropout_text, "cfg_dropout_all", self.cfg_dropout_all)

    def common(self) -> ComposedConfig:
        """Every option."""
        return ResolvedConfig(
            prompts=self.prompts,
            layers=self.layers,
            flow=self.flow,
            cfg_dropout=self.cfg_dropout_all,
            cfg_dropout_text=self.cfg_dropout_text,
            reference_latents=self.reference_latents,
            canvas=self.canvas,
            canvas_pixels=self.canvas_pixels,
            read_pixels=self.read_pixels,
            blank=self.blank,
            pack=self.pack,
            too_long=self.too_long,
            alignment=self.alignment,
            token_routing=self.token_routing,
        )


Preset = ComposedConfig | OmniGen2Settings | OvisU1Config
