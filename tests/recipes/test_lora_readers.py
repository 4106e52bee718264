"""LoRA files that we write, read by PEFT, by diffusers' pipelines and by ComfyUI's key rules; and theirs by us.

Each row of the tables in docs/lora.md is held here against the installed libraries.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import tiny_sizes
from diptych.checkpoints.lora_files import DIFFUSERS_WEIGHTS, METADATA, Update, read_lora, write_lora
from diptych.core.errors import UserError
from diptych.parts.added_lora import Factors, attach, trained
from diptych.parts.decoders.omnigen2 import OmniGen2
from diptych.parts.decoders.published import PublishedDecoder
from diptych.parts.decoders.qwen_image import QwenImage
from diptych.parts.decoders.sana import Sana
from diptych.parts.decoders.sd3 import SD3
from diptych.parts.lora import adapted_module, add_lora, linear_layers
from diptych.recipes.load import load_system
from diptych.recipes.lora import homes

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient checkpointing:UserWarning"),
]
SANA = {**tiny_sizes.SANA, "timestep_scale": 0.5}
SD3_SIZES: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 12,
    "pos_embed_max_size": 8,
}
DECODERS: dict[str, tuple[type[PublishedDecoder], dict[str, Any]]] = {
    "qwen_image": (QwenImage, tiny_sizes.QWEN_IMAGE),
    "sana": (Sana, SANA),
    "sd3": (SD3, SD3_SIZES),
}
TARGETS = ["to_q", "to_v", "to_out.0"]
RANK, ALPHA = 3, 7.0
"""A scale that is not 1, so that a lost alpha shows."""


def make(name: str) -> PublishedDecoder:
    kind, config = DECODERS[name]
    torch.manual_seed(0)
    decoder = kind.from_config(config)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    return decoder.eval()


def adapted(name: str) -> PublishedDecoder:
    """The same decoder with trained adapters."""
    decoder = make(name)
    add_lora(decoder, rank=RANK, alpha=ALPHA, dropout=0.0, targets=TARGETS)
    torch.manual_seed(1)
    for parameter in decoder.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return decoder.eval()


def updates(decoder: nn.Module) -> dict[str, Update]:
    return {name: (each.down, each.up, each.alpha) for name, each in trained(adapted_module(decoder)).items()}


def transformer(name: str) -> Any:
    """diffusers' model with the decoder's weights, without what we put into it."""
    ours: Any = make(name).model
    theirs = type(ours).from_config(ours.config)
    theirs.load_state_dict(ours.state_dict())
    return theirs.eval()


def pipeline(name: str, model: Any) -> Any:
    """diffusers' pipeline around a transformer."""
    torch.manual_seed(2)
    parts: dict[str, Any] = {"transformer": model, "text_encoder": None, "tokenizer": None}
    if name == "qwen_image":
        vae = AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        )  # fmt: skip
        made: Any = QwenImagePipeline(scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, **parts)
    elif name == "sana":
        flow: Any = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        made = SanaPipeline(scheduler=DPMSolverMultistepScheduler(**flow), vae=AutoencoderDC(**tiny_sizes.DC), **parts)
    else:
        parts |= {"text_encoder_2": None, "text_encoder_3": None, "tokenizer_2": None, "tokenizer_3": None}
        made = StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=AutoencoderKL(**tiny_sizes.KL), **parts
        )
    made.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def picture(name: str, pipe: Any) -> Tensor:
    """What the pipeline draws of fixed states, as latents."""
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(1, 5, 12, generator=generator)
    mask = torch.ones(1, 5, dtype=torch.long)
    options: dict[str, Any] = {"prompt_embeds": states, "num_inference_steps": 2, "output_type": "latent"}
    options |= {"generator": torch.Generator().manual_seed(4)}
    if name == "qwen_image":
        options |= {"prompt_embeds_mask": mask, "true_cfg_scale": 1.0, "height": 16, "width": 16}
    elif name == "sana":
        options |= {"prompt_attention_mask": mask, "guidance_scale": 1.0, "height": 32, "width": 32}
        options |= {"use_resolution_binning": False}
    else:
        options |= {"pooled_prompt_embeds": torch.randn(1, 12, generator=generator), "guidance_scale": 1.0}
        options |= {"height": 8, "width": 8}
    return pipe(**options).images


def changes(name: str, file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> str:
    """What diffusers makes of a file: "as trained", "no effect", "another picture", or an exception's class."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    pipe = pipeline(name, transformer(name))
    plain = picture(name, pipe)
    try:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    except Exception as error:  # what it raises is what is measured
        return type(error).__name__
    found = picture(name, pipe)
    if torch.equal(found, plain):
        return "no effect"
    tuned = transformer(name)
    attach(tuned, {layer: [(factors, 1.0)] for layer, factors in trained(adapted_module(adapted(name))).items()})
    wanted = picture(name, pipeline(name, tuned))
    return "as trained" if torch.allclose(found, wanted, atol=1e-5) else "another picture"


@pytest.mark.parametrize("name", list(DECODERS))
def test_diffusers_pipelines_draw_the_same_from_our_file(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = updates(adapted(name))
    [file] = write_lora(tmp_path, {"decoder": own}, "diffusers")
    assert changes(name, file, caplog, monkeypatch) == "as trained"
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    # SD3's loader also looks for adapters of its text encoders, and says that there are none.
    assert not [text for text in said if "prefix='text_encoder" not in text], "nothing is left over"


@pytest.mark.parametrize("name", list(DECODERS))
def test_diffusers_own_files_are_read(name: str, tmp_path: Path) -> None:
    """With metadata, alpha is kept; without, diffusers itself has lost it, and the scale is 1 for it and for us."""
    decoder = adapted(name)
    kind = type(pipeline(name, decoder.model))
    weights = get_peft_model_state_dict(decoder.model, adapter_name="default")
    own = updates(decoder)
    config = decoder.model.peft_config["default"].to_dict()
    for sub, metadata, alpha in (("with", config, ALPHA), ("without", None, float(RANK))):
        kind.save_lora_weights(
            str(tmp_path / sub), transformer_lora_layers=weights, transformer_lora_adapter_metadata=metadata
        )
        found = read_lora(tmp_path / sub)
        assert found.keys() == {f"transformer.{layer}" for layer in own}
        for layer, (down, up, _) in own.items():
            theirs = found[f"transformer.{layer}"]
            assert torch.equal(theirs[0], down)
            assert torch.equal(theirs[1], up)
            assert theirs[2] == alpha


ROWS = {
    "transformer., PEFT's names, alpha in the metadata": "as trained",
    "transformer., PEFT's names, without alpha": "another picture",
    "transformer., PEFT's names, alpha as tensors": "NoMatchingPeftModuleError",
    "base_model.model.": "no effect",
    "no prefix, without alpha": "no effect",
    "no prefix, alpha as tensors": "as trained",
    "diffusion_model., alpha as tensors (our comfyui)": "as trained",
    "lora_unet_, alpha as tensors (our kohya)": "as trained",
}
"""What diffusers 0.42.1's QwenImagePipeline makes of each kind of file."""


@pytest.mark.parametrize("row", list(ROWS))
def test_what_diffusers_reads_for_qwen_image(
    row: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = updates(adapted("qwen_image"))
    if row.endswith(("(our comfyui)", "(our kohya)")):
        [file] = write_lora(tmp_path, {"decoder": own}, row.rpartition("our ")[2].rstrip(")"))
    elif row.startswith("base_model"):
        file = write_lora(tmp_path, {"decoder": own}, "peft")[0]
    elif row.endswith("metadata"):
        [file] = write_lora(tmp_path, {"decoder": own}, "diffusers")
    else:
        prefix = "transformer." if row.startswith("transformer") else ""
        tensors: dict[str, Tensor] = {}
        for layer, (down, up, alpha) in own.items():
            tensors |= {f"{prefix}{layer}.lora_A.weight": down.clone(), f"{prefix}{layer}.lora_B.weight": up.clone()}
            if "as tensors" in row:
                tensors[f"{prefix}{layer}.alpha"] = torch.tensor(alpha)
        file = tmp_path / "file.safetensors"
        save_file(tensors, file)
    assert changes("qwen_image", file, caplog, monkeypatch) == ROWS[row]


@pytest.mark.parametrize("name", [*DECODERS, "omnigen2"])
def test_peft_reads_our_folder(name: str, tmp_path: Path) -> None:
    if name == "omnigen2":
        system: Any = load_system("toy/omnigen2")[0]
        plain: Any = copy.deepcopy(system.decoder)
        decoder = system.decoder
        add_lora(decoder, rank=RANK, alpha=ALPHA, dropout=0.0, targets=TARGETS)
        for key, parameter in decoder.named_parameters():
            if ".lora_" in key:
                nn.init.normal_(parameter, std=0.3)
    else:
        decoder, plain = adapted(name), make(name).model
    module = adapted_module(decoder)
    own = updates(decoder)
    first = next(iter(own))
    own[first] = (own[first][0][:2].clone(), own[first][1][:, :2].clone(), 5.0)  # a layer of another rank and alpha
    write_lora(tmp_path, {"decoder": own}, "peft")
    theirs = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    for layer, (down, up, alpha) in own.items():
        wrapped: Any = theirs.base_model.model.get_submodule(layer)
        base: Any = wrapped.base_layer
        x = torch.randn(2, base.in_features)
        with torch.no_grad():
            wanted = base(x) + alpha / down.shape[0] * (x @ down.T @ up.T)
            torch.testing.assert_close(wrapped(x), wanted)
    found = [key for key, child in theirs.base_model.model.named_modules() if hasattr(child, "lora_A")]
    assert sorted(found) == sorted(own), "nothing is left over"
    assert set(own) <= set(linear_layers(module))


@pytest.mark.parametrize("name", ["toy/bagel", "toy/ovis-u1", "toy/omnigen2", "toy/iomm"])
def test_peft_reads_our_folder_for_a_language_model(name: str, tmp_path: Path) -> None:
    """Each layer gives the same, no other layer is adapted, and the whole model where it takes tokens by itself."""
    module = homes(load_system(name)[0])["llm"].eval()
    plain: Any = copy.deepcopy(module)
    torch.manual_seed(1)
    own: dict[str, Update] = {}
    for layer, linear in linear_layers(module).items():
        if layer.endswith(("q_proj", "v_proj")):
            down, up = torch.randn(RANK, linear.in_features) / 9, torch.randn(linear.out_features, RANK)
            own[layer] = (down, up, ALPHA)
    assert own
    write_lora(tmp_path, {"llm": own}, "peft")
    theirs = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    attach(module, {layer: [(Factors(down=down, up=up, alpha=alpha), 1.0)] for layer, (down, up, alpha) in own.items()})
    inside: Any = theirs.base_model.model
    with torch.no_grad():
        for layer in own:
            x = torch.randn(2, inside.get_submodule(layer).base_layer.in_features)
            torch.testing.assert_close(inside.get_submodule(layer)(x), module.get_submodule(layer)(x))
        if isinstance(module, PreTrainedModel):
            ids = torch.arange(2, 12)[None]
            wanted = module(ids)[0]
            torch.testing.assert_close(theirs(ids)[0], wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    adapted_layers = [key for key, child in inside.named_modules() if hasattr(child, "lora_A")]
    assert sorted(adapted_layers) == sorted(own), "nothing is left over"


def comfyui_targets(decoder: nn.Module) -> dict[str, str]:
    """The names under which ComfyUI looks for a LoRA of a model whose weights stand under `diffusion_model.`: the
    weight's own name without its ending, and `lora_unet_` with underscores (its documentation of LoRA keys)."""
    names: dict[str, str] = {}
    for key in decoder.state_dict():
        if key.endswith(".weight"):
            layer = key.removesuffix(".weight")
            names[f"diffusion_model.{layer}"] = layer
            names["lora_unet_" + layer.replace(".", "_")] = layer
    return names


def comfyui_patches(file: Path, names: Mapping[str, str]) -> tuple[dict[str, Tensor], set[str]]:
    """Deltas by layer of a file by ComfyUI's rules (up and down, or B and A, beside alpha), and the keys left over."""
    tensors = load_file(file)
    deltas: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, layer in names.items():
        for first, second in (("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")):
            keys = [f"{name}.{first}", f"{name}.{second}", f"{name}.alpha"]
            if keys[0] in tensors and keys[1] in tensors:
                down, up = tensors[keys[0]], tensors[keys[1]]
                scale = float(tensors[keys[2]]) / down.shape[0] if keys[2] in tensors else 1.0
                deltas[layer] = scale * (up @ down)
                used |= {*keys} & {*tensors}
    return deltas, {*tensors} - used


@pytest.mark.parametrize("format", ["comfyui", "kohya"])
def test_comfyui_patches_omnigen2_as_trained(format: str, tmp_path: Path) -> None:
    """The names of OmniGen2's layers are those of its release in ComfyUI too (comfy/ldm/omnigen/omnigen2.py)."""
    system: Any = load_system("toy/omnigen2")[0]
    decoder: OmniGen2 = system.decoder
    plain = copy.deepcopy(decoder)
    add_lora(decoder, rank=RANK, alpha=ALPHA, dropout=0.0, targets=TARGETS)
    for key, parameter in decoder.named_parameters():
        if ".lora_" in key:
            nn.init.normal_(parameter, std=0.3)
    own = updates(decoder)
    [file] = write_lora(tmp_path, {"decoder": own}, format)
    deltas, left = comfyui_patches(file, comfyui_targets(plain))
    assert not left
    assert deltas.keys() == own.keys()
    for layer, delta in deltas.items():
        torch.testing.assert_close(delta, ALPHA / RANK * (own[layer][1] @ own[layer][0]))


@pytest.mark.parametrize("format", ["peft", "diffusers", "comfyui", "kohya"])
def test_every_format_comes_back_with_its_alpha(format: str, tmp_path: Path) -> None:
    own = updates(adapted("qwen_image"))
    first = next(iter(own))
    own[first] = (own[first][0][:2].clone(), own[first][1][:, :2].clone(), 5.0)
    write_lora(tmp_path, {"decoder": own}, format)
    found = read_lora(tmp_path)
    assert len(found) == len(own)
    assert {(round(alpha, 5), len(down)) for down, _, alpha in found.values()} == {(5.0, 2), (ALPHA, RANK)}


def test_peft_settings_that_change_the_scale(tmp_path: Path) -> None:
    """rslora, and patterns of rank and alpha, as PEFT itself saves them."""
    module = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    config: Any = {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["a", "b"]}
    config |= {"rank_pattern": {"b": 2}, "alpha_pattern": {"b": 5}, "init_lora_weights": False}
    made: Any = inject_adapter_in_model(LoraConfig(**config), module)
    made.peft_config["default"].save_pretrained(str(tmp_path))
    state = get_peft_model_state_dict(made, adapter_name="default")
    save_file(
        {f"base_model.model.{key}": value for key, value in state.items()}, tmp_path / "adapter_model.safetensors"
    )
    found = read_lora(tmp_path)
    for name in ("a", "b"):
        layer = made[name]
        down, up, alpha = found[f"base_model.model.{name}"]
        x = torch.randn(3, 6)
        with torch.no_grad():
            torch.testing.assert_close(layer(x) - layer.base_layer(x), alpha / len(down) * (x @ down.T @ up.T))


def test_the_metadata_is_what_diffusers_writes(tmp_path: Path) -> None:
    [file] = write_lora(tmp_path, {"decoder": updates(adapted("sana"))}, "diffusers")
    assert file.name == DIFFUSERS_WEIGHTS
    with safe_open(file, framework="pt") as opened:
        values = json.loads(opened.metadata()[METADATA])
    assert (values["transformer.r"], values["transformer.lora_alpha"]) == (RANK, ALPHA)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"transformer.a.lora_A.weight": torch.zeros(2, 3)}, "transformer.a has one of the two matrices alone"),
        (
            {"a.lora_A.weight": torch.zeros(2, 3), "a.lora_B.weight": torch.zeros(3, 4)},
            "are no two matrices of one rank",
        ),
        ({"a.lokr_w1": torch.zeros(2)}, r"holds LoKr \(a.lokr_w1\)"),
        ({"a.lora_A.weight": torch.zeros(2, 3), "a.dora_scale": torch.zeros(2)}, "holds DoRA"),
        ({"a.weight": torch.zeros(2)}, "a.weight is no key of a LoRA"),
        ({"a.alpha": torch.zeros(())}, "holds no LoRA"),
    ],
)
def test_what_is_no_lora_is_refused(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "file.safetensors")
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path / "file.safetensors")


def test_updates_are_added_beside_bfloat16_weights() -> None:
    layer = nn.ModuleDict({"a": nn.Linear(4, 4, dtype=torch.bfloat16)})
    small = Factors(down=torch.full((1, 4), 1e-3), up=torch.full((4, 1), 1e-3), alpha=1.0)
    x = torch.zeros(1, 4, dtype=torch.bfloat16)
    before = layer["a"](x)
    attach(layer, {"a": [(small, 1.0), (small, 2.0)]})
    assert layer["a"](x).dtype == torch.bfloat16
    assert torch.equal(layer["a"](x), before)
    assert layer["a"].lora_up.dtype == torch.float32
    assert torch.allclose(layer["a"].lora_up @ layer["a"].lora_down, 3 * small.delta())
