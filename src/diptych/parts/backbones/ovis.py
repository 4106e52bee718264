"""The MLLM of Ovis-U1 (Sec. 2): AIMv2 at native resolution, the probabilistic visual tokenizer, and Qwen3.

Parameter names are those of the published checkpoint. Deviations: sequences are padded on the right, and positions
count real tokens, which gives the same states; a conversation that is too long is an error unless one asks for `cut`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from diptych.checkpoints import aimv2
from diptych.checkpoints.deferred import active
from diptych.checkpoints.tensors import load_into, read_tensors, weight_files
from diptych.core.errors import UserError, unknown
from diptych.core.reading import read_object
from diptych.core.tokens import NextToken, likeliest
from diptych.parts.backbones.aimv2 import AIMv2Config
from diptych.parts.backbones.answers import continued
from diptych.parts.backbones.base import Backbone, Prefix
from diptych.parts.backbones.causal import cut, run_causal
from diptych.parts.backbones.native_resolution import Pixels
from diptych.parts.backbones.ovis_chat import NO_THOUGHTS, OvisChat
from diptych.parts.backbones.ovis_processor import OvisProcessor
from diptych.parts.backbones.packed_rows import run_packed
from diptych.parts.backbones.processor import Sequences, VisionInputs
from diptych.parts.backbones.published import without_origin
from diptych.parts.backbones.visual_tokenizer import IMAGE_START, SPECIAL, VisualEmbedding, VisualTokenizer

MODEL_TYPE = "diptych_ovis"
"""In the config.json of an MLLM that is saved by itself."""

WEIGHTS = "model.safetensors"
HEAD = "llm.lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class OvisConfig:
    """llm: configuration of the language model, with its `model_type`, as transformers has it.

    vision: of the tower, under the published names. visual_vocab_size: visual vocabulary, the four special entries
    included.
    max_length: longest sequence. preface: see `OvisChat`. min_pixels, max_pixels, mean, std: see `Pixels`.
    """

    llm: dict[str, Any]
    vision: dict[str, Any]
    visual_vocab_size: int
    max_length: int
    preface: str = NO_THOUGHTS
    min_pixels: int = 448 * 448
    max_pixels: int = 1792 * 1792
    mean: tuple[float, ...] = field(default=Pixels.mean)
    std: tuple[float, ...] = field(default=Pixels.std)


class Ovis(Backbone):
    """See the module's docstring. Use `from_config` or `from_pretrained`. Attention is PyTorch's SDPA."""

    packs = True

    def __init__(self, config: OvisConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
        super().__init__()
        tower = vision_config(config.vision)
        if config.visual_vocab_size <= SPECIAL:
            raise UserError(f"ovis: visual_vocab_size {config.visual_vocab_size}; at least {SPECIAL + 1} are needed")
        self.settings = config
        self.llm: Any = language_model(config.llm)
        text: Any = self.llm.config
        self.width = text.hidden_size
        self.max_length = min(config.max_length, text.max_position_embeddings)
        self.visual_tokenizer = VisualTokenizer(tower, config.visual_vocab_size)
        self.vte = VisualEmbedding(config.visual_vocab_size, self.width)
        self.processor: OvisProcessor = OvisProcessor(  # pyright: ignore[reportIncompatibleVariableOverride]
            None if tokenizer is None else OvisChat(tokenizer, config.preface),
            Pixels(
                patch=tower.patch_size,
                merge=tower.hidden_stride,
                **{name: getattr(config, name) for name in ("min_pixels", "max_pixels", "mean", "std")},
            ),
            vocabulary=text.vocab_size,
            max_length=self.max_length,
        )

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, image_processor: Any = None
    ) -> Ovis:
        """Random weights; under `torch.device("meta")` without memory.

        Args:
            config: fields of `OvisConfig`. tokenizer: None where no text is read, as in builds on the meta device.

        Raises:
            UserError: an unknown or missing key, a wrong value, or parts that do not fit each other.
        """
        known = {entry.name for entry in fields(OvisConfig)}
        for key in config:
            if key not in known:
                raise unknown("key", key, known, "ovis")
        for key in ("llm", "vision", "visual_vocab_size", "max_length"):
            if key not in config:
                raise UserError(f"ovis: {key!r} is missing in its config")
        return cls(OvisConfig(**config), tokenizer)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, dtype: torch.dtype = torch.float32) -> Ovis:
        """A folder that `save_pretrained` wrote; the published Ovis-U1 is a whole system, loaded as one."""
        folder = Path(source).expanduser()
        config = read_object(folder / "config.json")
        if config.pop("model_type", None) != MODEL_TYPE:
            raise UserError(f"{source}: not an Ovis MLLM saved by this library (model_type {MODEL_TYPE})")
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        made = cls.from_config(config, tokenizer).to(dtype)
        try:
            if active() is not None:
                load_into(made, read_tensors([folder / WEIGHTS]), str(source))
                return made
            tensors = load_file(folder / WEIGHTS)
            missing, unexpected = made.load_state_dict(tensors, strict=False)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(
                f"{source}: the weights are not readable or do not fit: {' '.join(str(error).split())}"
            ) from error
        missing = [name for name in missing if name != HEAD or not made.tied]
        if missing or unexpected:
            names = ", ".join([*missing, *unexpected][:5])
            raise UserError(f"{source}: the weights do not fit the config: missing or unexpected {names}")
        return made

    @property
    def chat(self) -> OvisChat:
        return self.processor.chat

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding table."""
        return self.llm.lm_head.weight is self.llm.get_input_embeddings().weight

    @classmethod
    def resolved(cls, config: Mapping[str, Any], values_of: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        """`llm` and `vision` may be names; next to a named tower, `vision_options` sets what Ovis changes in it
        (`hidden_stride`, windows)."""
        values = dict(config)
        options = values.pop("vision_options", {})
        if isinstance(name := values.get("llm"), str):
            plain = without_origin(values_of(name))
            values["llm"] = {key: value for key, value in plain.items() if key != "torch_dtype"}
        if isinstance(name := values.get("vision"), str):
            values["vision"] = aimv2.sizes(values_of(name))
        if options:
            values["vision"] = {**values["vision"], **options}
        return values

    def read_named(self, config: Mapping[str, Any], folder_of: Callable[[str], Path]) -> None:
        if isinstance(name := config.get("llm"), str):
            load_into(self.llm, read_tensors(weight_files(folder_of(name))), name)
        if isinstance(name := config.get("vision"), str):
            tower = self.visual_tokenizer.backbone
            side = tower.config.image_size // tower.config.patch_size
            load_into(tower, aimv2.to_ours(read_tensors(weight_files(folder_of(name))), side), name)

    @classmethod
    def tokenizer_of(cls, config: Mapping[str, Any]) -> str | None:
        name = config.get("llm")
        return name if isinstance(name, str) else None

    @classmethod
    def vocabulary(cls, config: Mapping[str, Any]) -> int:
        return config["llm"]["vocab_size"]

    def plain_config(self) -> dict[str, Any]:
        """What `from_config` takes, in plain JSON values."""
        llm = without_origin(self.llm.config.to_dict())
        tower = asdict(self.visual_tokenizer.backbone.config)
        return {**asdict(self.settings), "llm": llm, "vision": tower}

    def vision_features(self, inputs: VisionInputs) -> list[Tensor]:
        tokens = self.vte(self.visual_tokenizer(inputs.values, inputs.grids))  # (sum U, D)
        return list(tokens.split([self.visual_tokenizer.count(grid) for grid in inputs.grids]))

    def embed(self, ids: Tensor) -> Tensor:
        """As `Backbone.embed`; indicators (-301 to -304) take rows of the visual table, slots are filled later."""
        words = self.llm.get_input_embeddings()(ids.clamp(min=0))
        special = ids <= IMAGE_START
        indicators = self.vte.indicators(ids.clamp(max=IMAGE_START)).to(words.dtype)
        return torch.where(special[..., None], indicators, words)

    def run(
        self,
        embeddings: Tensor,
        mask: Tensor,
        prefix: Prefix | None = None,
        *,
        positions: Tensor | None = None,
        cache: bool = False,
        layers: int = 1,
        pack: int = 0,
    ) -> Prefix:
        assert positions is None, "Ovis's positions count real tokens"
        if pack:
            assert prefix is None and not cache, "packed rows neither continue a prefix nor are continued"  # noqa: PT018
            return run_packed(self.llm.model, embeddings, mask, layers=layers, pack=pack)
        return run_causal(self.llm.model, embeddings, mask, prefix, cache=cache, layers=layers)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.llm.lm_head(hidden)

    @torch.no_grad()
    def generate(
        self,
        sequences: Sequences,
        vision: Sequence[Tensor],
        *,
        max_new_tokens: int,
        choose: NextToken = likeliest,
        keep_last: int | None = None,
    ) -> list[str]:
        embeddings = self.place(self.embed(sequences.ids), sequences.images, vision)
        if keep_last is not None:
            sequences, embeddings = cut(sequences, embeddings, keep_last, "last")
        ends = self.chat.end_ids
        ids = continued(self, embeddings, sequences, ends=ends, max_new_tokens=max_new_tokens, choose=choose)
        return [self.chat.decode(row) for row in ids]

    def named_parts(self) -> dict[str, nn.Module]:
        """`llm`, `vision` (the tower), `head` (to the visual words), `adapter` (the words' embeddings).

        Table 1 counts the head to the encoder and the embeddings as the adapter; Sec. 2 calls both the adapter.
        """
        return {
            "llm": self.llm,
            "vision": self.visual_tokenizer.backbone,
            "head": self.visual_tokenizer.head,
            "adapter": self.vte,
        }

    def shard_units(self) -> list[nn.Module]:
        return [*self.visual_tokenizer.backbone.trunk.blocks, *self.llm.model.layers]

    @property
    def adapter_home(self) -> nn.Module:
        """The language model, transformers' own."""
        return self.llm

    def save_assets(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)

    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        text = json.dumps({"model_type": MODEL_TYPE, **self.plain_config()}, indent=1)
        (folder / "config.json").write_text(text, encoding="utf-8")
        tensors = {name: x for name, x in self.state_dict().items() if name != HEAD or not self.tied}
        cast = {name: x.to("cpu", dtype).contiguous() for name, x in tensors.items()}
        save_file(cast, folder / WEIGHTS, metadata={"format": "pt"})
        self.save_assets(folder)


def language_model(config: Mapping[str, Any]) -> Any:
    """A causal language model of transformers with random weights, from its configuration."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    kind = config.get("model_type")
    if kind is None:
        raise UserError("ovis: llm needs a 'model_type', such as qwen3")
    try:
        known = set(AutoConfig.for_model(kind).to_dict())
    except ValueError as error:
        raise UserError(f"ovis: llm: transformers has no model_type {kind!r}") from error
    for key in values:
        if key not in known | RETIRED:
            raise unknown("key", key, known, "ovis: llm")
    try:
        built = type(AutoConfig.for_model(kind)).from_dict({**values, "model_type": kind})
        return AutoModelForCausalLM.from_config(built, attn_implementation="sdpa")
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(f"ovis: llm: {' '.join(str(error).split())}") from error


RETIRED = frozenset({"torch_dtype", "rope_theta", "rope_scaling", "head_dim", "sliding_window", "use_bfloat16"})
"""Keys of published language models that current configuration classes read but no longer list."""


def vision_config(values: Mapping[str, Any]) -> AIMv2Config:
    """The tower's configuration; UserError names an unknown or missing key."""
    known = {entry.name: entry for entry in fields(AIMv2Config)}
    for key in values:
        if key not in known:
            raise unknown("key", key, known, "ovis: vision")
    try:
        return AIMv2Config(**values)
    except TypeError as error:
        raise UserError(f"ovis: vision: {error}") from error
