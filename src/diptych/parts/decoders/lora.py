"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on a decoder, through PEFT and in its file format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diptych.core.errors import UserError, unknown
from diptych.parts.decoders.published import PublishedDecoder

ADAPTER = "default"
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def add_lora(decoder: nn.Module, rank: int, alpha: float, dropout: float, targets: Sequence[str]) -> None:
    """Put adapters on the linear layers whose names end in one of `targets`, in place; only adapters stay trainable.

    Starts as the unchanged decoder, since the second factor is zero. The update is alpha / rank times B A.

    Args:
        decoder: any decoder, or a language model that makes images itself.
        rank: inner width of the adapters.
        alpha: scale, in units of `rank`.
        dropout: on the adapters' input.
        targets: last parts of module names ("to_q", "to_out.0").

    Raises:
        UserError: a target that names no linear layer, a rank below 1, or a decoder that has adapters.
    """
    if rank < 1:
        raise UserError(f"LoRA: rank must be at least 1, got {rank}")
    module = adapted_module(decoder)
    if lora_config(module) is not None:
        raise UserError("LoRA: this decoder has adapters already")
    linear = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise unknown("LoRA target", target, {leaf(name) for name in linear})
    inject(
        module,
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets)),  # pyright: ignore[reportArgumentType]
    )


def save_lora(decoder: nn.Module, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as PEFT's own `PeftModel` does and reads."""
    module = adapted_module(decoder)
    config = lora_config(module)
    if config is None:
        raise UserError("LoRA: this decoder has no adapters to save")
    folder.mkdir(parents=True, exist_ok=True)
    saved = LoraConfig(**{**config.to_dict(), "inference_mode": True})
    saved.save_pretrained(str(folder))
    weights: dict[str, Tensor] = get_peft_model_state_dict(module, adapter_name=ADAPTER)
    save_file({PREFIX + key: value.contiguous() for key, value in weights.items()}, folder / WEIGHTS)


def load_lora(decoder: nn.Module, folder: Path) -> None:
    """Put the adapters saved in `folder` on a decoder; trainable, where a decoder has none yet they are added.

    Raises:
        UserError: no adapter there, unreadable weights, or keys that do not fit the decoder.
    """
    for name in ("adapter_config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no adapter here (no {name})")
    try:
        loaded = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS}: not a safetensors file ({error})") from error

    module = adapted_module(decoder)
    if lora_config(module) is None:
        config = LoraConfig.from_pretrained(str(folder))
        config.inference_mode = False
        assert isinstance(config, LoraConfig)
        inject(module, config)

    weights = {key.removeprefix(PREFIX): value for key, value in loaded.items()}
    expected: dict[str, Tensor] = get_peft_model_state_dict(module, adapter_name=ADAPTER)
    for problem, keys in (("missing", expected.keys() - weights.keys()), ("unexpected", weights.keys() - expected)):
        if keys:
            raise UserError(f"{folder / WEIGHTS}: {problem} keys: {', '.join(sorted(keys)[:5])}")
    for key, value in weights.items():
        if value.shape != expected[key].shape:
            raise UserError(
                f"{folder / WEIGHTS}: {key} has shape {tuple(value.shape)}, expected {tuple(expected[key].shape)}"
            )
    set_peft_model_state_dict(module, weights, adapter_name=ADAPTER)


def adapted_module(decoder: nn.Module) -> nn.Module:
    """Where adapters live: the diffusers model itself where there is one, so that files fit it directly."""
    return decoder.model if isinstance(decoder, PublishedDecoder) else decoder


def inject(module: nn.Module, config: LoraConfig) -> None:
    """Adapters into `module`; everything else is frozen."""
    module.requires_grad_(False)
    inject_adapter_in_model(config, module, adapter_name=ADAPTER)


def lora_config(module: nn.Module) -> LoraConfig | None:
    """The configuration of the adapters in `module`, None where there are none."""
    configs = module.__dict__.get("peft_config")
    return None if configs is None else configs[ADAPTER]


def leaf(name: str) -> str:
    """The name by which a layer is targeted: its last part, with the part before where that is a number."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
