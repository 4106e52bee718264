"""Training steps of OpenUni and MetaQuery at small width: a frozen MLLM, learned queries, a connector, SANA.

`recomputed` is ours with `run.checkpointing: [decoder]`, which both recipes have; `plain` is the same computation
written with transformers and diffusers alone, as the releases' loops have it: prompt and queries run through the MLLM
in one pass, and the step ends with clipping and torch's default AdamW.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from torch import Tensor, nn
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from cases.understanding import built
from diptych.core.draws import Draws
from diptych.core.sample import Batch, Sample
from diptych.recipes.recipe import load_plain
from diptych.training.config import OptimizerConfig
from diptych.training.loop import freeze
from diptych.training.optimizers import build_optimizers
from diptych.training.parallel import clip

try:
    from diptych.training.recompute import recompute_activations
except ModuleNotFoundError:  # older revisions, of which `recomputed` is not asked

    def recompute_activations(system: Any, parts: Any) -> None: ...


BATCH, QUERIES, SIDE = 4, 256, 16
PROMPT = "a red circle left of a blue square and a green cross above a pink triangle on a gray background. " * 3
TRAIN = ("queries", "connector", "decoder")
ADAMW: dict[str, Any] = {"lr": 1e-6, "betas": (0.9, 0.95)}

Ways = dict[str, Callable[[], Any]]


def language(width: int, layers: int) -> dict[str, Any]:
    """A Qwen2 language model."""
    return {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
    }


def internvl(width: int, layers: int) -> dict[str, Any]:
    """A backbone around it with the toy world's tokenizer; its vision tower is small, as these steps see no image."""
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"text_config": {"model_type": "qwen2", **language(width, layers)}, "image_token_id": 5}
    config |= {"vision_config": {**vision, "image_size": [32, 32], "patch_size": [8, 8]}, "image_seq_length": 4}
    return {"kind": "internvl", "tokenizer": "toyworld", "config": config}


def sana(width: int, layers: int, condition: int) -> dict[str, Any]:
    """SANA over 256 image tokens."""
    return {
        "in_channels": 3,
        "out_channels": 3,
        "num_layers": layers,
        "num_attention_heads": width // 32,
        "attention_head_dim": 32,
        "num_cross_attention_heads": width // 64,
        "cross_attention_head_dim": 64,
        "cross_attention_dim": width,
        "caption_channels": condition,
        "sample_size": SIDE,
    }


def openuni() -> Ways:
    """MLLM of width 512 with 6 layers, the 6-layer connector, SANA of width 384 with 6 blocks."""
    width, layers = 512, 6
    plain: dict[str, Any] = copy.deepcopy(load_plain("iomm/openuni_l_finetune_mix")["system"])
    plain["backbone"] = internvl(width, layers)
    connector = {"hidden": width, "mlp": 4 * width, "heads": width // 64, "layers": 6, "arrangement": "enc_proj"}
    plain["connector"]["config"] = connector
    plain["decoder"] = {"kind": "sana", "config": sana(384, 6, 512)}
    plain["autoencoder"] = {"kind": "pixel"}
    sizes: Any = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    made: Any = SiglipVisionConfig(**sizes, num_hidden_layers=6)
    plainly = written_out(width, layers, SiglipEncoder(made), width, 512, (384, 6))
    return {"ours": ours(plain), "recomputed": ours(plain, recompute=True), "plain": plainly}


def metaquery() -> Ways:
    """MLLM of width 256 with 6 layers, the 24-layer connector, SANA of width 384 with 6 blocks."""
    width, layers = 256, 6
    plain: dict[str, Any] = copy.deepcopy(load_plain("metaquery/sana")["system"])
    plain["backbone"] = internvl(width, layers)
    plain["decoder"] = {"kind": "sana", "config": sana(384, 6, 384)}
    plain["autoencoder"] = {"kind": "pixel"}
    sizes = {**language(width, 24), "intermediate_size": 4 * width, "num_key_value_heads": width // 64}
    encoder = Bidirectional(Qwen2Config(**sizes))
    plainly = written_out(width, layers, encoder, width, 384, (384, 6))
    return {"ours": ours(plain), "recomputed": ours(plain, recompute=True), "plain": plainly}


class Bidirectional(nn.Module):
    """Qwen2's layers, in which every token sees every token."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.model = Qwen2Model(config)
        del self.model.embed_tokens

    def forward(self, inputs_embeds: Tensor) -> Any:
        everything = torch.zeros(1, 1, inputs_embeds.shape[1], inputs_embeds.shape[1])
        return self.model(inputs_embeds=inputs_embeds, attention_mask=everything, use_cache=False)


def ours(plain: dict[str, Any], recompute: bool = False) -> Callable[[], Any]:
    """recompute: with `run.checkpointing: [decoder]`, which both recipes have."""
    system = built(plain).train()
    if recompute:
        recompute_activations(system, ["decoder"])
    freeze(system, TRAIN)
    parameters = {name: p for name, p in system.named_parameters() if p.requires_grad}
    optimizers = build_optimizers(OptimizerConfig(**ADAMW), parameters, system.shard_units())
    images = torch.rand(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = Batch(tuple(Sample(id=str(k), task="text_to_image", text=PROMPT, image=x) for k, x in enumerate(images)))
    draws = Draws(range(BATCH), "cpu")
    prepared = system.prepare(batch, draws) if hasattr(system, "prepare") else batch

    def step() -> Any:
        (losses,) = system.losses(prepared, draws).values()
        loss = losses.mean()
        loss.backward()
        clip(list(parameters.values()), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def written_out(
    width: int, layers: int, encoder: nn.Module, inner: int, condition: int, drawn: tuple[int, int]
) -> Callable[[], Any]:
    """A step with transformers and diffusers: `encoder` at width `inner`, a linear layer to `condition`."""
    mllm = Qwen2Model(Qwen2Config(**language(width, layers))).requires_grad_(False)
    queries = nn.Parameter(torch.randn(QUERIES, width) / width**0.5)
    projector = nn.Linear(inner, condition)
    decoder = SanaTransformer2DModel(**sana(*drawn, condition))
    learned = [queries, *encoder.parameters(), *projector.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(learned, **ADAMW)
    ids = torch.randint(0, 512, (BATCH, 64))
    images = torch.rand(BATCH, 3, SIDE, SIDE) * 2 - 1

    def step() -> Any:
        prompt = mllm.embed_tokens(ids)
        sequence = torch.cat([prompt, queries.expand(BATCH, -1, -1)], dim=1)
        states = mllm(inputs_embeds=sequence, use_cache=False).last_hidden_state[:, -QUERIES:]
        tokens = projector(encoder(inputs_embeds=states).last_hidden_state)
        noise, t = torch.randn_like(images), torch.rand(BATCH, 1, 1, 1)
        noisy = (1 - t) * images + t * noise
        output = decoder(noisy, encoder_hidden_states=tokens, timestep=t.flatten() * 1000, return_dict=False)[0]
        loss = (output.float() - (noise - images)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
