"""Whole images against diffusers' pipelines with the same tiny random weights, prompt to pixels, at 1e-5.

The pipelines' networks are built from diffusers' classes; what they have in common with ours is the weights.
"""

from __future__ import annotations

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
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig

import tiny_sizes
from diptych.core.condition import ScaleConditions, TokenCondition
from diptych.core.draws import Draws, key
from diptych.core.sample import Batch, Sample
from diptych.inference.engine import Engine
from diptych.inference.sampling import Sampling
from diptych.parts.backbones.toy_tokenizer import train_tokenizer
from diptych.recipes.build import build_system
from diptych.recipes.load import load
from diptych.recipes.recipe import load as load_recipe
from diptych.recipes.recipe import parse
from diptych.systems.base import AssembledSystem

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PROMPTS = ["a red circle left of a blue square, on grey", "two"]
SEED = 7
ROWS = 700
QWEN_SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}


def shaken(module: nn.Module, std: float = 0.1) -> None:
    """Random weights everywhere: some layers of a new network are zero."""
    torch.manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)


def noise(shape: tuple[int, int, int], count: int) -> Tensor:
    """What the engine draws for the first image of each prompt."""
    return Draws([key(SEED, place, 0) for place in range(count)]).normal("noise", *shape)


def close(found: Tensor, expected: Tensor) -> None:
    assert float(expected.std()) > 0.02, "an image"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# Qwen-Image: a released folder, from the prompt on


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QwenImagePipeline]:
    """A pipeline of tiny parts, and the folder that it saves."""
    torch.manual_seed(0)
    texts = [*PROMPTS, "<|im_start|>system\nuser assistant<|im_end|>"] * 5
    rows = train_tokenizer(texts, 300)
    folder = tmp_path_factory.mktemp("qwen")
    rows.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]})
    rows.save_pretrained(str(folder / "words"))
    tokenizer = Qwen2Tokenizer.from_pretrained(str(folder / "words"))
    config = Qwen2_5_VLConfig(
        image_token_id=rows.get_vocab()["<|image_pad|>"],
        video_token_id=ROWS - 1,
        text_config={
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "vocab_size": ROWS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 24,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [0],
        },
    )
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    shaken(transformer)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 2.0],
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(**QWEN_SCHEDULER)  # type: ignore[arg-type]
    pipeline = QwenImagePipeline(
        scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=tokenizer, transformer=transformer
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(str(folder / "release"))
    return folder / "release", pipeline


@pytest.mark.parametrize(("steps", "cfg"), [(3, 4.0), (5, 1.0)])
@torch.no_grad()
def test_qwen_image(steps: int, cfg: float, qwen: tuple[Path, QwenImagePipeline]) -> None:
    folder, pipeline = qwen
    engine = load(str(folder))
    size = (24, 32)
    samples = [Sample(id=text, task="text_to_image", text=text) for text in PROMPTS]
    found = torch.stack(engine.tensors(samples, n=1, seed=SEED, size=size, steps=steps, cfg=cfg, batch_size=2))
    drawn = noise((4, 12, 16), 2)
    packed = pipeline._pack_latents(drawn[:, :, None], 2, 4, 12, 16)
    theirs = pipeline(
        prompt=PROMPTS,
        negative_prompt=[" ", " "] if cfg > 1 else None,  # type: ignore[arg-type]
        true_cfg_scale=cfg,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        latents=packed,
        output_type="pt",
    ).images
    close((found + 1) / 2, torch.as_tensor(theirs))
    plain = torch.stack(engine.tensors(samples, n=1, seed=SEED, size=size, steps=steps, cfg=cfg, guidance="chain"))
    assert bool((plain - found).abs().max() > 1e-3) == (cfg > 1), "each token's length is kept"


# SANA and SD3 behind HieraQuery, from its condition on


def engine_of(plain: dict[str, Any], decoder: dict[str, Any], autoencoder: dict[str, Any], **sampling: Any) -> Engine:
    """A hieraquery system of one scale around a tiny MLLM, with these parts."""
    body = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    body |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    plain["system"] |= {
        "kind": "hieraquery",
        "flow": {"prediction": "velocity"},
        "conditioner": {"kind": "hierarchical_queries", "config": {"scales": [2]}},
        "connector": {"kind": "qwen2", "config": {"body": body}},
        "decoder": decoder,
        "autoencoder": autoencoder,
    }
    torch.manual_seed(0)
    system = build_system(parse(plain).system)
    assert isinstance(system, AssembledSystem)
    shaken(system.decoder)
    shaken(system.autoencoder, 0.2)
    return Engine(system, Sampling(size=(32, 64), batch_size=2, **sampling))


def conditions(engine: Engine) -> tuple[TokenCondition, TokenCondition]:
    """What the decoder is given for the prompts, and for requests without text."""
    batch = Batch(tuple(Sample(id=text, task="text_to_image", text=text) for text in PROMPTS))
    made = [engine.system.encode(each) for each in (batch, engine.system.without(batch, "text_and_images"))]
    scales = [each.scales[-1] for each in made if isinstance(each, ScaleConditions)]
    assert float((scales[0].tokens - scales[1].tokens).abs().max()) > 0.01
    return scales[0], scales[1]


def ours(engine: Engine, **options: Any) -> Tensor:
    samples = [Sample(id=text, task="text_to_image", text=text) for text in PROMPTS]
    return (torch.stack(engine.tensors(samples, n=1, seed=SEED, **options)) + 1) / 2


SANA = {**tiny_sizes.SANA, "sample_size": 8}


@pytest.mark.parametrize(("steps", "cfg"), [(4, 4.5), (18, 1.0)])
@torch.no_grad()
def test_sana(steps: int, cfg: float, tiny_plain: dict[str, Any]) -> None:
    settings = load_recipe("metaquery/sana")[0].sampling
    options = {"solver": settings.solver, "timestep_shift": settings.timestep_shift}
    decoder, autoencoder = {"kind": "sana", "config": SANA}, {"kind": "dc", "config": tiny_sizes.PUBLISHED_DC}
    engine = engine_of(tiny_plain, decoder, autoencoder, **options)
    assert isinstance(engine.system, AssembledSystem)
    transformer, vae = SanaTransformer2DModel(**SANA).eval(), AutoencoderDC(**tiny_sizes.PUBLISHED_DC).eval()  # type: ignore[arg-type]
    transformer.load_state_dict(engine.system.decoder.model.state_dict())
    vae.load_state_dict(engine.system.autoencoder.model.state_dict())
    released = {"algorithm_type": "dpmsolver++", "prediction_type": "flow_prediction", "flow_shift": 3.0}
    pipeline = SanaPipeline(
        tokenizer=None,  # type: ignore[arg-type]
        text_encoder=None,  # type: ignore[arg-type]
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, **released),  # type: ignore[arg-type]
    )
    pipeline.set_progress_bar_config(disable=True)
    full, null = conditions(engine)
    theirs = pipeline(
        prompt=None,  # type: ignore[arg-type]
        negative_prompt=None,  # type: ignore[arg-type]
        prompt_embeds=full.tokens,
        prompt_attention_mask=full.full_mask().long(),
        negative_prompt_embeds=null.tokens,
        negative_prompt_attention_mask=null.full_mask().long(),
        guidance_scale=cfg,
        height=32,
        width=64,
        num_inference_steps=steps,
        latents=noise((4, 16, 32), 2),
        use_resolution_binning=False,
        output_type="pt",
    ).images
    close(ours(engine, steps=steps, cfg=cfg), torch.as_tensor(theirs))


SD3 = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 24,
}
KL = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}


@pytest.mark.parametrize(("steps", "cfg"), [(4, 7.0), (6, 1.0)])
@torch.no_grad()
def test_sd3(steps: int, cfg: float, tiny_plain: dict[str, Any]) -> None:
    settings = load_recipe("hieraquery/sd3")[0].sampling
    options = {"solver": settings.solver, "timestep_shift": settings.timestep_shift}
    decoder, autoencoder = {"kind": "sd3", "config": SD3}, {"kind": "kl", "config": KL}
    engine = engine_of(tiny_plain, decoder, autoencoder, **options)
    assert isinstance(engine.system, AssembledSystem)
    transformer, vae = SD3Transformer2DModel(**SD3).eval(), AutoencoderKL(**KL).eval()  # type: ignore[arg-type]
    transformer.load_state_dict(engine.system.decoder.model.state_dict())
    vae.load_state_dict(engine.system.autoencoder.model.state_dict())
    empty: Any = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"))
    empty |= dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=scheduler, **empty)
    pipeline.set_progress_bar_config(disable=True)
    full, null = conditions(engine)
    theirs = pipeline(
        prompt_embeds=full.tokens,
        pooled_prompt_embeds=full.pooled,
        negative_prompt_embeds=null.tokens,
        negative_pooled_prompt_embeds=null.pooled,
        guidance_scale=cfg,
        height=32,
        width=64,
        num_inference_steps=steps,
        latents=noise((4, 16, 32), 2),
        output_type="pt",
    ).images
    close(ours(engine, steps=steps, cfg=cfg), torch.as_tensor(theirs))
