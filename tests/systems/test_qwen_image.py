"""Qwen-Image as a preset of the composed system: its condition is the pipeline's, and LoRA is a part of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

from diptych.checkpoints.tensors import read_tensors, weight_files
from diptych.core.draws import Draws
from diptych.core.sample import Batch, Sample
from diptych.parts.autoencoders.pixel import PixelAutoencoder
from diptych.parts.backbones.qwen2_5_vl import Qwen2_5VL
from diptych.parts.backbones.toy_tokenizer import train_tokenizer
from diptych.parts.conditioners.raw import Raw
from diptych.parts.decoders.qwen_image import LORA_TARGETS, QwenImage
from diptych.parts.lora import add_lora
from diptych.recipes import recipe as recipes
from diptych.systems.composed import ComposedSystem
from diptych.systems.presets import ComposedConfig
from diptych.systems.prompts import Prompts

CAPTIONS = ["a red circle", "a red circle left of a blue square, on grey", ""]
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
ROWS = 700


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = train_tokenizer([TEMPLATE, *CAPTIONS] * 5, ROWS - 20)
    made.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]})
    return made


@pytest.fixture
def system(tokenizer: PreTrainedTokenizerFast) -> ComposedSystem:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "image_token_id": tokenizer.get_vocab()["<|image_pad|>"],
        "video_token_id": ROWS - 1,
        "text_config": {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "vocab_size": ROWS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 24,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [0],
        },
    }
    processor = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=1024)
    backbone = Qwen2_5VL.from_config(config, tokenizer, processor).requires_grad_(False)
    sizes = {"in_channels": 12, "out_channels": 3, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 1}
    decoder = QwenImage.from_config({**sizes, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6)})
    add_lora(decoder, rank=2, alpha=2, dropout=0.0, targets=LORA_TARGETS)
    spec = recipes.load("iomm/qwen_image_finetune_mix_512")[0].system
    assert isinstance(spec, recipes.ComposedSpec)
    skip = len(tokenizer(TEMPLATE, add_special_tokens=False)["input_ids"])
    origins = {"conditioner": {"kind": "raw"}, "connector": {"kind": "identity"}, "autoencoder": {"kind": "pixel"}}
    return ComposedSystem(
        ComposedConfig(prompts=spec.prompts, prompt_skip=skip, mask_ratio=0.85),
        backbone=backbone,
        conditioner=Raw.from_config({}),
        connector=torch.nn.Identity(),
        decoder=decoder,
        autoencoder=PixelAutoencoder(),
        origins={**origins, "backbone": {"weights": "published"}, "decoder": {"weights": "published"}},
    )


def test_condition_is_the_pipelines(system: ComposedSystem) -> None:
    backbone = system.backbone
    assert isinstance(backbone, Qwen2_5VL)
    pipeline = QwenImagePipeline(
        scheduler=None,  # type: ignore[arg-type]
        vae=None,  # type: ignore[arg-type]
        text_encoder=backbone.model,
        tokenizer=backbone.tokenizer,  # type: ignore[arg-type]
        transformer=None,  # type: ignore[arg-type]
    )
    assert pipeline.prompt_template_encode.startswith(TEMPLATE)
    pipeline.prompt_template_encode_start_idx = system.settings.prompt_skip  # 34 with the published tokenizer
    with torch.no_grad():
        captions = [caption or system.settings.prompts.null for caption in CAPTIONS]
        embeds, mask = pipeline._get_qwen_prompt_embeds(captions, device=torch.device("cpu"))
        batch = Batch(tuple(Sample(id=str(i), task="text_to_image", text=text) for i, text in enumerate(CAPTIONS)))
        condition = system.encode(batch)
    assert torch.equal(condition.full_mask(), mask.bool())
    torch.testing.assert_close(condition.tokens[mask.bool()], embeds[mask.bool()], atol=1e-5, rtol=1e-5)


def test_the_preset_drops_the_published_template() -> None:
    spec = recipes.load("iomm/qwen_image_finetune_mix_512")[0].system
    assert isinstance(spec, recipes.ComposedSpec)
    assert spec.prompt_skip == 34
    assert spec.prompts == Prompts(
        system=TEMPLATE.split("\n")[1].removesuffix("<|im_end|>"), text_to_image="{text}", null=" "
    )


def test_lora_trains_alone_on_images_and_pairs_and_is_saved_alone(system: ComposedSystem, tmp_path: Path) -> None:
    image = torch.rand(3, 8, 8) * 2 - 1
    batch = Batch(
        (Sample(id="0", task="image", image=image), Sample(id="1", task="text_to_image", image=image, text="a circle"))
    )
    parts = system.named_parts()
    system.requires_grad_(False)
    parts["lora"].requires_grad_(True)
    losses = system.losses(system.prepare(batch, Draws([1, 2])), Draws([1, 2]))
    assert losses.keys() == {"flow.image", "flow.text_to_image"}
    torch.stack([loss.sum() for loss in losses.values()]).sum().backward()
    learned = {name for name, parameter in system.named_parameters() if parameter.grad is not None}
    assert learned
    assert all(".lora_" in name for name in learned)
    assert all(parameter.grad is None for parameter in parts["decoder"].parameters())

    system.mark_trained(["lora"])
    system.save_pretrained(tmp_path)
    saved = {name for name, _ in read_tensors(weight_files(tmp_path))}
    assert saved == {name for name, _ in system.named_parameters() if ".lora_" in name}
