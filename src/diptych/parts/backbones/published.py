"""What the backbones over transformers share: reading their folders, checking keys, writing them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import logging as transformers_logging

from diptych.checkpoints.deferred import active, to_be_loaded
from diptych.checkpoints.scaled import scale_hint
from diptych.checkpoints.streaming import stream
from diptych.checkpoints.tensors import load_into, weight_files
from diptych.core.errors import UserError, unknown
from diptych.core.reading import read_object
from diptych.parts.backbones.chat import Chat

log = logging.getLogger(__name__)

_OLD_KEYS = {"torch_dtype", "use_bfloat16", "rope_theta", "rope_scaling", "auto_map", "head_dim", "tie_word_embeddings"}
"""Keys of published text and vision configs that current config classes no longer list."""

_ORIGIN_KEYS = {"_name_or_path", "architectures", "dtype", "transformers_version", "id2label", "label2id"}


def without_origin(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration's values without where it came from or how it was stored."""
    return {
        key: without_origin(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _ORIGIN_KEYS
    }


def check_keys(values: Mapping[str, Any], text: PreTrainedConfig, whole: PreTrainedConfig) -> None:
    """UserError on a key that neither the configuration nor its `text_config` or `vision_config` has."""
    for place in ("text_config", "vision_config"):
        if not isinstance(values.get(place, {}), Mapping):
            raise UserError(f"{place}: a mapping is needed, not {values[place]!r}")
    vision: Any = whole.vision_config
    for place, given, known in (
        ("config", values, whole),
        ("text_config", values.get("text_config") or {}, text),
        ("vision_config", values.get("vision_config") or {}, vision),
    ):
        choices = set(known.to_dict()) | {"model_type"}
        for key in given:
            if key not in choices | _OLD_KEYS:
                raise unknown("key", key, choices, place)


IMAGE_SETTINGS = "preprocessor_config.json"
PROCESSOR_SETTINGS = "processor_config.json"
"""What processors of transformers 5 write alone; the image processor's settings are inside."""


def image_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of an image processor in a folder, from the file of either kind; None where there are none."""
    if (folder / IMAGE_SETTINGS).is_file():
        return read_object(folder / IMAGE_SETTINGS)
    if (folder / PROCESSOR_SETTINGS).is_file():
        return read_object(folder / PROCESSOR_SETTINGS).get("image_processor")
    return None


def image_processor(cls: type[Any], folder: Path) -> Any:
    """The image processor of a folder; None, which a line of the log says, where it has no settings for one.

    Args:
        cls: an image processor of transformers.
    """
    if image_settings(folder) is None:
        log.warning("%s: no settings of an image processor (%s, %s); the defaults of %s are used",
                    folder, IMAGE_SETTINGS, PROCESSOR_SETTINGS, cls.__name__)  # fmt: skip
        return None
    return cls.from_pretrained(str(folder))


def read_config(
    source: str | Path, cls: type[PreTrainedConfig], family: str, example: str
) -> tuple[str, PreTrainedConfig]:
    """The name by which transformers finds `source`, and its configuration, which must be of `cls`."""
    name = str(source)
    local = Path(source).expanduser()
    if local.is_dir():
        name = str(local)
        if not (local / "config.json").is_file():
            raise UserError(f"{source}: no model folder (it has no config.json)")
    elif local.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise UserError(f"{source}: no such folder, and no hub id (owner/name)")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise unreadable(source, error) from error
    if not isinstance(config, cls):
        raise UserError(
            f"{source}: a {config.model_type!r} model, not {family} in transformers' layout (for example {example})"
        )
    return name, config


def read_model(architecture: Any, source: str | Path, name: str, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """The weights of a folder or hub id, safetensors only, strictly: every key there, none left over."""
    if active() is not None and Path(name).is_dir():
        return deferred_model(architecture, Path(name), config, dtype)
    try:
        with without_bars():
            loaded: Any = architecture.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (OSError, ValueError) as error:
        raise unreadable(source, error) from error
    model, info = loaded
    complaints = [
        f"{what} {', '.join(sorted(str(key) for key in info[field]))}"
        for what, field in (
            ("missing", "missing_keys"),
            ("unexpected", "unexpected_keys"),
            ("wrongly shaped", "mismatched_keys"),
        )
        if info[field]
    ]
    if complaints:
        hint = scale_hint(info["unexpected_keys"])
        raise UserError(f"{source}: the weights do not fit the config: {'; '.join(complaints)}{hint}")
    return model


def deferred_model(architecture: Any, folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """A model of transformers whose weights are read later (`checkpoints.deferred`), under the names that transformers
    gives to those of the files."""
    with to_be_loaded():
        model = architecture._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    wanted = model.state_dict()
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]

    def renamed() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stream(weight_files(folder)):
            ours, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
            if converter is not None:
                raise UserError(f"{folder}: {name} is put together from others, which a sharded start does not do")
            if ours in wanted or not any(pattern.search(ours) for pattern in ignored):
                yield ours, tensor

    load_into(model, renamed(), str(folder))
    return model


def write_model(model: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """config.json and safetensors in transformers' own layout; weights as `dtype` where one is given."""
    weights: dict[str, Tensor] = model.state_dict()
    if dtype is not None:
        cast = {x.data_ptr(): x.to(dtype) for x in weights.values()}  # tied weights stay one
        weights = {name: cast[x.data_ptr()] for name, x in weights.items()}
    with without_bars():
        model.save_pretrained(folder, state_dict=weights)
    # transformers records the format of the model's first weight. Where some learned, and so are float32 beside frozen
    # ones, all are loaded as these.
    formats = {x.dtype for x in weights.values() if x.is_floating_point()}
    widest = dtype or (formats.pop() if len(formats) == 1 else torch.float32)
    record_dtype(folder / "config.json", str(widest).removeprefix("torch."))


def record_dtype(file: Path, dtype: Any) -> None:
    """Write into a configuration the number format that its weights are loaded in."""
    file.write_text(json.dumps({**read_object(file), "dtype": dtype}, indent=2), encoding="utf-8")


@contextmanager
def without_bars() -> Iterator[None]:
    """transformers' progress bars off inside the block; the setting is put back."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def matching_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase, config: Any) -> Chat:
    """The same chat, whose image token and vocabulary are those of the configuration."""
    if chat.image_id != config.image_token_id:
        raise UserError(
            f"tokenizer: {chat.image} has id {chat.image_id}, "
            f"but the config's image_token_id is {config.image_token_id}"
        )
    rows = config.text_config.vocab_size
    if tokenizer.vocab_size > rows:  # published tokenizers may add tokens, such as <video>, that have no row
        raise UserError(f"tokenizer has {tokenizer.vocab_size} tokens, but text_config.vocab_size is {rows}")
    return chat


def check_rows(ids: Tensor, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """UserError on a token beyond the embedding's rows."""
    if (ids >= rows).any():
        token = tokenizer.convert_ids_to_tokens(int(ids.max()))
        raise UserError(f"a text holds {token!r}, which this model has no embedding for")


def unreadable(source: str | Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    if Path(source).expanduser().is_dir():
        return UserError(f"{source}: not readable; safetensors and tokenizer files are needed ({reason})")
    return UserError(f"{source}: hub id not reachable, unknown, or without safetensors ({reason})")
