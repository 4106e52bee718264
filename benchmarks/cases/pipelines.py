"""Samplers against diffusers' pipelines over the same transformer: Qwen-Image, SANA, SD3.

Pipelines are given the embeddings of prompts and return latents; they have no text encoder and no autoencoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
from diffusers.pipelines.sana.pipeline_sana import SanaPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from cases.sampling import branches
from diptych.core.condition import TokenCondition
from diptych.parts.decoders.qwen_image import QwenImage
from diptych.parts.decoders.sana import Sana
from diptych.parts.decoders.sd3 import SD3

STEPS, SCALE = 4, 4.0
Ways = dict[str, Callable[[], Any]]


def random_weights(decoder: Any) -> Any:
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return decoder.eval()


@torch.no_grad()
def guided(decoder: Any, conditions: list[TokenCondition], x: Tensor, times: Tensor, renorm: bool = False) -> Tensor:
    """Euler's steps between these times, guided by text."""
    velocities = branches(decoder, conditions)
    for now, after in pairwise(times):
        null, full = velocities(x, now[None])
        v = null + SCALE * (full - null)
        if renorm:
            v = v * (full.norm(dim=1, keepdim=True) / v.norm(dim=1, keepdim=True))
        x = x + (after - now) * v
    return x


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def qwen_image() -> Ways:
    """Width 384, 6 blocks, 256 image tokens; prompt of 60 tokens, negative prompt of 12."""
    config = {
        "num_layers": 6,
        "num_attention_heads": 6,
        "attention_head_dim": 64,
        "joint_attention_dim": 256,
        "axes_dims_rope": (16, 24, 24),
    }
    decoder = random_weights(QwenImage.from_config(config))
    prompt, negative = torch.randn(1, 60, 256), torch.randn(1, 12, 256)
    noise = torch.randn(1, 16, 32, 32)
    grid = torch.linspace(1, 1 / STEPS, STEPS)
    shifted = math.exp(0.5) / (math.exp(0.5) + (1 / grid - 1))
    times = torch.cat([shifted, torch.zeros(1)])
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts: Any = {"vae": None, "text_encoder": None, "tokenizer": None}
    pipeline = quiet(QwenImagePipeline(scheduler=scheduler, transformer=decoder.model, **parts))

    def theirs() -> Any:
        return pipeline(
            prompt_embeds=prompt,
            prompt_embeds_mask=torch.ones(1, 60, dtype=torch.long),
            negative_prompt_embeds=negative,
            negative_prompt_embeds_mask=torch.ones(1, 12, dtype=torch.long),
            true_cfg_scale=SCALE,
            height=256,
            width=256,
            num_inference_steps=STEPS,
            output_type="latent",
        )

    conditions = [TokenCondition(tokens=negative), TokenCondition(tokens=prompt)]
    return {"ours": lambda: guided(decoder, conditions, noise, times, renorm=True), "diffusers": theirs}


def sana() -> Ways:
    """Width 384, 6 blocks, 256 latent tokens."""
    config = {
        "in_channels": 32,
        "out_channels": 32,
        "num_layers": 6,
        "num_attention_heads": 12,
        "attention_head_dim": 32,
        "num_cross_attention_heads": 6,
        "cross_attention_head_dim": 64,
        "cross_attention_dim": 384,
        "caption_channels": 256,
        "sample_size": 16,
    }
    decoder = random_weights(Sana.from_config(config))
    prompt, negative = torch.randn(1, 60, 256), torch.randn(1, 12, 256)
    padded = torch.cat([negative, torch.zeros(1, 48, 256)], dim=1)
    mask = torch.arange(60)[None] < 12
    parts: Any = {"vae": None, "text_encoder": None, "tokenizer": None}
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    pipeline = quiet(SanaPipeline(scheduler=scheduler, transformer=decoder.model, **parts))

    def theirs() -> Any:
        return pipeline(
            prompt=None,
            negative_prompt=None,
            prompt_embeds=prompt,
            prompt_attention_mask=torch.ones(1, 60, dtype=torch.long),
            negative_prompt_embeds=padded,
            negative_prompt_attention_mask=mask.long(),
            guidance_scale=SCALE,
            height=512,
            width=512,
            num_inference_steps=STEPS,
            use_resolution_binning=False,
            output_type="latent",
        )

    conditions = [TokenCondition(tokens=negative), TokenCondition(tokens=prompt)]
    noise, times = torch.randn(1, 32, 16, 16), torch.linspace(1, 0, STEPS + 1)
    return {"ours": lambda: guided(decoder, conditions, noise, times), "diffusers": theirs}


def sd3() -> Ways:
    """Width 384, 6 blocks, 256 image tokens; both prompts of 77 tokens, as SD3 pads them."""
    config = {
        "sample_size": 32,
        "num_layers": 6,
        "num_attention_heads": 6,
        "attention_head_dim": 64,
        "joint_attention_dim": 256,
        "caption_projection_dim": 384,
        "pooled_projection_dim": 128,
        "pos_embed_max_size": 48,
    }
    decoder = random_weights(SD3.from_config(config))
    peer: Any = type(decoder.model)(**config).eval()
    peer.load_state_dict(decoder.model.state_dict())
    prompt, negative = torch.randn(2, 1, 77, 256).unbind()
    pooled = torch.randn(2, 1, 128)
    parts: Any = {"vae": None, **{f"text_encoder{k}": None for k in ("", "_2", "_3")}}
    parts |= {f"tokenizer{k}": None for k in ("", "_2", "_3")}
    pipeline = quiet(StableDiffusion3Pipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=peer, **parts))

    def theirs() -> Any:
        return pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            pooled_prompt_embeds=pooled[0],
            negative_pooled_prompt_embeds=pooled[1],
            guidance_scale=SCALE,
            height=256,
            width=256,
            num_inference_steps=STEPS,
            output_type="latent",
        )

    conditions = [TokenCondition(tokens=negative, pooled=pooled[1]), TokenCondition(tokens=prompt, pooled=pooled[0])]
    noise, times = torch.randn(1, 16, 32, 32), torch.linspace(1, 0, STEPS + 1)
    return {"ours": lambda: guided(decoder, conditions, noise, times), "diffusers": theirs}
