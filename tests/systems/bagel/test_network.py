"""The packed forward, losses and gradients, the layer with and without cache, and SigLIP, as the reference has them."""

from __future__ import annotations

import pytest
import torch
from bagel_golden import Golden, close, item, llm_config, raw_times, vision_config
from torch import Tensor
from torch.nn import functional as F

from diptych.checkpoints.bagel import linear_patches, our_name, to_ours
from diptych.checkpoints.tensors import load_into
from diptych.core.patchify import patchify
from diptych.core.rope import line_rotation
from diptych.objectives.flow_matching import shift_times
from diptych.parts.backbones.attention import KeyValue, PackAttention, PackLayout
from diptych.parts.backbones.mot import MoTLayer
from diptych.parts.backbones.siglip_navit import SigLIPNaViT
from diptych.systems.bagel.items import pack


def test_packed_forward_losses_and_gradients() -> None:
    golden = Golden("train_forward")
    network = golden.network()
    packing, samples = golden.data["packing"], golden.data["samples"]
    items = [[item(values, packing) for values in sample["items"]] for sample in samples]
    row = pack(items, golden.markers(packing), network.sides())
    pictures = [golden[f"inputs.vit_image.{i}"] for i in range(len(row.vision_lengths))]
    patches = torch.cat([network.vision.patches(picture) for picture in pictures])
    assert torch.equal(patches, golden["steps.batch.packed_vit_tokens"])
    p = network.config.latent_patch
    latents = torch.cat(
        [
            patchify(latent[None, :, : h * p, : w * p], p, "pqc")[0]
            for latent, (h, w) in zip(golden["inputs.padded_latent"], row.latent_grids, strict=True)
        ]
    )
    times = row.token_times(shift_times(raw_times(samples).sigmoid(), golden.data["config"]["timestep_shift"]))
    noisy = (1 - times[:, None]) * latents + times[:, None] * golden["inputs.noise"]
    close(latents, golden["steps.latent_tokens"])
    close(times, golden["steps.t"])
    close(noisy, golden["steps.x_t"])
    close(network.port.time(times), golden["steps.time_embedding"])
    features = network.vision(patches, row.vision_ids, row.vision_lengths)
    close(features, golden["steps.vit_output"])
    close(network.connector(features), golden["steps.connector_output"])

    def in_row(text: Tensor, vision: Tensor, latent: Tensor) -> Tensor:
        whole = text.new_zeros(row.length, text.shape[1])
        places = torch.cat([row.text_places, row.vision_places, row.latent_places])
        return whole.index_copy(0, places, torch.cat([text, vision, latent]))

    close(in_row(*network.embed(row, patches, noisy, times)), golden["steps.hidden.input"])
    states = network.run(row, patches, noisy, times)
    hidden = in_row(states.text, states.vision, states.latent)
    close(hidden, golden["steps.hidden.final_norm"])

    logits = network.llm.lm_head(hidden[row.learned_places])
    ce = F.cross_entropy(logits, row.labels, reduction="none")
    velocity = network.port.leave(hidden[row.flow_places])
    found = torch.searchsorted(row.latent_places, row.flow_places)
    target = (golden["inputs.noise"] - latents)[found]
    mse = (velocity - target).square()
    close(logits, golden["steps.ce_logits"])
    close(velocity, golden["steps.velocity_pred"])
    close(target, golden["steps.velocity_target"])
    close(ce, golden["outputs.ce"])
    close(mse, golden["outputs.mse"])
    close((ce * row.label_weights).sum() / row.label_weights.sum(), golden["outputs.loss_ce_reweighted"])
    total = golden.data["ce_weight"] * ce.mean() + golden.data["mse_weight"] * mse.mean()
    close(total, golden["outputs.loss_total"])

    total.backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    for name in golden.data["grad_names"]:
        found_gradient = gradients[our_name(name)]
        assert found_gradient is not None
        close(found_gradient, golden[f"outputs.grad.{name}"], 1e-4)
    norms = golden["outputs.grad_norms"]
    assert len(norms) == len(gradients)
    for name, expected in zip(golden.data["grad_norm_names"], norms.tolist(), strict=True):
        gradient = gradients[our_name(name)]
        assert gradient is not None
        assert float(gradient.double().norm()) == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def mot_layer(golden: Golden) -> MoTLayer:
    layer = MoTLayer(llm_config(golden.data["config"]))
    named = to_ours(golden.group("weights.").items())
    load_into(layer, ((name.removeprefix("llm.layers.0."), tensor) for name, tensor in named), "golden")
    return layer


def test_layer_and_its_gradients() -> None:
    golden = Golden("mot_layer")
    layer, config = mot_layer(golden), golden.data["config"]
    und, gen = golden["inputs.packed_und_token_indexes"], golden["inputs.packed_gen_token_indexes"]
    lists = [tuple(golden[f"inputs.{name}"].tolist()) for name in ("sample_lens", "split_lens", "attn_modes")]
    attention = PackAttention(PackLayout(lists[0], lists[1], lists[2], und, gen), torch.device("cpu"))
    x = golden["inputs.packed_sequence"].clone().requires_grad_()
    order = torch.cat([und, gen])
    turn = line_rotation(golden["inputs.packed_position_ids"], 16, config["rope_theta"])
    close(turn[0], golden["steps.rope_cos"])
    close(turn[1], golden["steps.rope_sin"])
    turn = (turn[0][order], turn[1][order])
    q, k, v = layer.und.project(x[und], (turn[0][: len(und)], turn[1][: len(und)]))
    close(q, golden["steps.q_rotated"][und])
    close(k, golden["steps.k_rotated"][und])
    close(v, golden["steps.v"][und])
    pair = layer(x[und], x[gen], turn, attention, 0)
    out = torch.zeros_like(x).index_copy(0, order, torch.cat(pair))
    close(out, golden["outputs.packed_sequence"])
    (out * golden["inputs.cotangent"]).sum().backward()
    assert x.grad is not None
    close(x.grad, golden["outputs.grad_input"])
    gradients = {f"llm.layers.0.{name}": parameter.grad for name, parameter in layer.named_parameters()}
    for name in golden.data["grad_names"]:
        gradient = gradients[our_name(name)]
        assert gradient is not None
        close(gradient, golden[f"outputs.grad.{name}"])
    for name, expected in zip(golden.data["grad_norm_names"], golden["steps.grad_norms"].tolist(), strict=True):
        gradient = gradients[our_name(name)]
        assert gradient is not None
        assert float(gradient.double().norm()) == pytest.approx(expected, rel=1e-4), name


def test_layer_continues_a_cache() -> None:
    golden = Golden("mot_layer")
    layer, config = mot_layer(golden), golden.data["config"]
    past: list[list[KeyValue] | None] = [None, None]
    for number, step in enumerate(golden.data["inference_steps"]):
        prefix = f"inputs.infer.{number}."
        lengths = tuple(golden[f"{prefix}query_lens"].tolist())
        everything = torch.arange(sum(lengths))
        und = golden.tensors.get(f"{prefix}text_indexes", everything)
        gen = golden.tensors.get(f"{prefix}vae_indexes", everything[:0])
        modes = (0 if step["causal"] else 1,) * 2
        layout = PackLayout(lengths, lengths, modes, und, gen)
        attention = PackAttention(layout, torch.device("cpu"), past=past, keep=True)
        order = torch.cat([und, gen])
        turn = line_rotation(golden[f"{prefix}position_ids"][order], 16, config["rope_theta"])
        x = golden[f"{prefix}query"]
        with torch.no_grad():
            pair = layer(x[und], x[gen], turn, attention, 0)
        close(torch.zeros_like(x).index_copy(0, order, torch.cat(pair)), golden[f"outputs.infer.{number}.query"])
        if step["update_cache"]:
            past = list(attention.kept)
        held = [row for row in past if row is not None]
        close(torch.cat([row[0][0] for row in held]), golden[f"steps.infer.{number}.cache_k"])
        close(torch.cat([row[0][1] for row in held]), golden[f"steps.infer.{number}.cache_v"])


def test_siglip() -> None:
    golden = Golden("siglip")
    vision = SigLIPNaViT(vision_config(golden.data["config"]))
    named = to_ours(golden.group("weights.").items())
    load_into(vision, ((name.removeprefix("vision."), tensor) for name, tensor in named), "golden")
    patches = torch.cat([vision.patches(golden[f"inputs.image.{i}"]) for i in range(3)])
    lengths = golden["steps.cu_seqlens"].diff().tolist()
    ids = golden["steps.packed_flattened_position_ids"]
    assert torch.equal(patches, golden["steps.packed_pixel_values"])
    close(vision.patch_embedding(patches) + vision.position_embedding(ids), golden["steps.embeddings"])
    close(vision(patches, ids, lengths), golden["outputs.last_hidden_state"])
    assert torch.equal(vision.patches(golden["inputs.numbered_image"]), golden["outputs.numbered_image_patches"])
    assert torch.equal(linear_patches(golden["inputs.conv2d_patch_weight"]), golden["outputs.linear_patch_weight"])
