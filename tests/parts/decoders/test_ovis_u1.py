"""Ovis-U1's refiner and decoder against the reference: outputs, gradients, guided sampling; padding and context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from diptych.checkpoints.ovis_u1 import to_ours, to_published
from diptych.core.condition import TokenCondition
from diptych.core.errors import UserError
from diptych.core.patchify import patchify, unpatchify
from diptych.inference.solvers import solve, times
from diptych.objectives.flow_matching import resolution_shift
from diptych.parts.conditioners.token_refiner import TokenRefiner, TokenRefinerConfig
from diptych.parts.decoders.ovis_u1 import OvisU1Decoder, OvisU1DecoderConfig
from diptych.training.recompute import recompute_blocks

GOLDEN = Path(__file__).parents[2] / "golden" / "ovis_u1"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(GOLDEN / f"{name}_a.safetensors", framework="pt") as file:
        meta = {key: json.loads(value) for key, value in file.metadata().items()}
        return meta, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


class Pair(nn.Module):
    """Refiner and decoder of a reference file, with its weights where `tensors` has them."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.refiner = TokenRefiner(
            TokenRefinerConfig(context_width=config["context_in_dim"], hidden=width, heads=2 * config["num_heads"])
        )
        self.decoder = OvisU1Decoder(
            OvisU1DecoderConfig(
                channels=config["in_channels"] // 4,
                patch=2,
                hidden=width,
                heads=config["num_heads"],
                double=config["depth"],
                single=config["depth_single_blocks"],
                axes=tuple(config["axes_dim"]),
                mlp_ratio=config["mlp_ratio"],
                theta=config["theta"],
                qkv_bias=config["qkv_bias"],
            )
        )
        given = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
        missing, unexpected = self.load_state_dict(dict(to_ours(given.items(), width)), strict=False)
        assert not unexpected
        assert len(missing) in (0, len(self.decoder.state_dict()))  # the refiner's file has no decoder

    def velocity(self, tensors: dict[str, Tensor], case: str) -> Tensor:
        x = unpacked(tensors[f"inputs.{case}.img"], tensors[f"inputs.{case}.img_ids"])
        latents = None
        if f"inputs.{case}.cond_img" in tensors:
            context = unpacked(tensors[f"inputs.{case}.cond_img"], tensors[f"inputs.{case}.cond_img_ids"])
            latents = tuple((latent,) for latent in context)
        condition = self.condition(tensors[f"inputs.{case}.txt"], latents)
        return patchify(self.decoder(x, tensors[f"inputs.{case}.timesteps"], condition), 2, "cpq")

    def condition(self, states: Tensor, latents: tuple[tuple[Tensor, ...], ...] | None = None) -> TokenCondition:
        tokens, pooled = self.refiner(states)
        return TokenCondition(tokens=tokens, pooled=pooled, context_latents=latents or ((),) * len(states))


def unpacked(tokens: Tensor, ids: Tensor) -> Tensor:
    return unpatchify(tokens, 2, "cpq", int(ids[..., 1].max()) + 1, int(ids[..., 2].max()) + 1)


@torch.no_grad()
def test_refiner_is_the_references() -> None:
    meta, tensors = golden("yak_refiner")
    refiner = Pair(meta["config"], tensors).refiner
    for case in meta["cases"]:
        tokens, pooled = refiner(tensors[f"inputs.{case}.txt"])
        torch.testing.assert_close(tokens, tensors[f"outputs.{case}.txt_fea"], **CLOSE)
        torch.testing.assert_close(pooled, tensors[f"outputs.{case}.txt_fea_avg"], **CLOSE)


@pytest.mark.parametrize("case", ["t2i", "edit"])
def test_velocity_loss_and_gradients_are_the_references(case: str) -> None:
    meta, tensors = golden("yak_gradients")
    pair = Pair(meta["config"], tensors)
    velocity = pair.velocity(tensors, case)
    torch.testing.assert_close(velocity, tensors[f"steps.{case}.velocity"], **CLOSE)
    loss = (velocity - tensors[f"inputs.{case}.target"]).square().mean()
    torch.testing.assert_close(loss, tensors[f"outputs.{case}.loss"], **CLOSE)
    loss.backward()
    found = ((name, value.grad) for name, value in pair.named_parameters() if value.grad is not None)
    gradients = dict(to_published(found))
    for name in meta["grad_params"]:
        whole = f"visual_generator.backbone.{name}"
        wanted = tensors[f"outputs.{case}.grad.{whole}"]
        atol = 5e-5 * float(wanted.abs().max())
        torch.testing.assert_close(gradients[whole], wanted, rtol=5e-5, atol=atol)
    norms = torch.stack([gradients[name].norm() for name in meta["grad_norm_names"]])
    torch.testing.assert_close(norms, tensors[f"outputs.{case}.grad_norms"], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_guided_sampling_in_one_batch_is_the_references_separate_passes() -> None:
    meta, tensors = golden("yak_sampling")
    pair = Pair(meta["config"], tensors)
    for case, told in meta["sampling"]["cases"].items():
        noise = tensors[f"inputs.{case}.noise"]
        if told["kind"] == "t2i":
            scales = [told["txt_cfg"]]
            branches = [pair.condition(tensors[f"inputs.{case}.{name}"]) for name in ("neg_txt", "txt")]
        else:
            scales = [told["img_cfg"], told["txt_cfg"]]
            latents = tuple((latent,) for latent in tensors[f"inputs.{case}.cond_latents"])
            branches = [
                pair.condition(tensors[f"inputs.{case}.no_both_txt"]),
                *(pair.condition(tensors[f"inputs.{case}.{name}"], latents) for name in ("no_txt_txt", "txt")),
            ]
        joined = branches[0].join(branches[1:])

        def velocity(x: Tensor, t: Tensor, joined: Any = joined, scales: list[float] = scales) -> Tensor:
            count = len(scales) + 1
            each = pair.decoder(torch.cat([x] * count), torch.cat([t] * count), joined).chunk(count)
            return each[0] + sum(s * (b - a) for a, b, s in zip(each[:-1], each[1:], scales, strict=True))

        tokens = noise.shape[2] * noise.shape[3] // 4
        shift = resolution_shift(tokens) if told["shift"] else 1.0
        found = solve(velocity, noise, times(told["num_steps"], shift))
        torch.testing.assert_close(found, tensors[f"outputs.{case}.latents"], rtol=1e-4, atol=1e-4)


def test_schedules_are_the_references() -> None:
    meta, tensors = golden("yak_sampling")
    for told in meta["sampling"]["schedules"]:
        shift = resolution_shift(told["image_seq_len"]) if told["shift"] else 1.0
        name = f"steps{told['num_steps']}_len{told['image_seq_len']}_{'shift' if told['shift'] else 'linear'}"
        wanted = tensors[f"outputs.schedule.{name}"].float()
        torch.testing.assert_close(times(told["num_steps"], shift), wanted, rtol=1e-6, atol=1e-6)


def test_published_keys_come_back_to_the_bit() -> None:
    _, tensors = golden("yak_gradients")
    given = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    back = dict(to_published(to_ours(given.items(), 32)))
    assert back.keys() == given.keys()
    assert all(torch.equal(back[key], given[key]) for key in given)


@torch.no_grad()
def test_padding_of_text_and_context_changes_nothing() -> None:
    meta, tensors = golden("yak_gradients")
    pair = Pair(meta["config"], tensors)
    texts = [torch.randn(1, length, 48) for length in (3, 6, 4)]
    contexts = [(), (torch.randn(4, 4, 6),), (torch.randn(4, 4, 6), torch.randn(4, 2, 2))]
    x, t = torch.randn(3, 4, 4, 4), torch.tensor([0.2, 0.5, 0.9])
    alone = [pair.condition(text, (context,)) for text, context in zip(texts, contexts, strict=True)]
    wanted = torch.cat([pair.decoder(x[i : i + 1], t[i : i + 1], condition) for i, condition in enumerate(alone)])
    torch.testing.assert_close(pair.decoder(x, t, alone[0].join(alone[1:])), wanted, **CLOSE)
    padded = nn.utils.rnn.pad_sequence([text[0] for text in texts], batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([[3], [6], [4]])
    tokens, pooled = pair.refiner(padded, mask)
    for row, condition in enumerate(alone):
        torch.testing.assert_close(tokens[row, mask[row]], condition.tokens[0], **CLOSE)
        torch.testing.assert_close(pooled[row], condition.pooled[0], **CLOSE)  # type: ignore[index]


def test_pooling_ways_of_table_9() -> None:
    states, mask = torch.randn(2, 5, 12), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    for pool in ("cls", "average", "none"):
        refiner = TokenRefiner(TokenRefinerConfig(context_width=12, hidden=16, heads=2, pool=pool))
        tokens, pooled = refiner(states, mask)
        assert tokens.shape == (2, 5, 16)
        if pool == "average":
            assert pooled is not None
            torch.testing.assert_close(pooled[1], tokens[1, :3].mean(0))
        assert (pooled is None) == (pool == "none")


def test_errors_name_the_culprit() -> None:
    config = OvisU1DecoderConfig(channels=4, patch=2, hidden=32, heads=2, double=1, single=1, axes=(4, 6, 6))
    decoder = OvisU1Decoder(config)
    tokens = torch.zeros(1, 2, 32)
    with pytest.raises(UserError, match="vector for the whole condition"):
        decoder(torch.zeros(1, 4, 4, 4), torch.ones(1), TokenCondition(tokens=tokens))
    odd = TokenCondition(tokens=tokens, pooled=tokens[:, 0], context_latents=((torch.zeros(4, 3, 4),),))
    with pytest.raises(UserError, match="context latent"):
        decoder(torch.zeros(1, 4, 4, 4), torch.ones(1), odd)
    with pytest.raises(UserError, match="axes"):
        OvisU1DecoderConfig(channels=4, patch=2, hidden=32, heads=2, double=1, single=1, axes=(4, 4, 6))
    with pytest.raises(UserError, match="heads"):
        TokenRefinerConfig(context_width=4, hidden=32, heads=3)


def test_checkpointing_changes_no_gradient() -> None:
    torch.manual_seed(0)
    decoder = OvisU1Decoder(
        OvisU1DecoderConfig(channels=4, patch=2, hidden=32, heads=2, double=1, single=1, axes=(4, 6, 6))
    )
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    condition = TokenCondition(tokens=torch.randn(1, 3, 32), pooled=torch.randn(1, 32))
    found: list[Tensor] = []
    for on in (False, True):
        recompute_blocks(decoder.shard_units() if on else [])
        decoder.zero_grad()
        decoder(torch.ones(1, 4, 4, 4), torch.ones(1), condition).square().sum().backward()
        assert decoder.image_in.weight.grad is not None
        found.append(decoder.image_in.weight.grad.clone())
    assert torch.equal(*found)
