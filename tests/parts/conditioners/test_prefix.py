"""Prefix reuse gives the states and gradients of the plain run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diptych.core.errors import UserError
from diptych.parts.backbones.internvl import InternVL
from diptych.parts.conditioners.base import Conditioner
from diptych.parts.conditioners.learnable_queries import LearnableQueries
from diptych.parts.conditioners.prefix import condition_states
from diptych.parts.conditioners.raw import Raw
from diptych.parts.conditioners.residual_query_adapter import ResidualQueryAdapter

WIDTH = 48
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 64,
}


@pytest.fixture
def backbone() -> InternVL:
    torch.manual_seed(0)
    config = {"vision_config": VISION, "text_config": TEXT, "image_token_id": 5, "image_seq_length": 4}
    built = InternVL.from_config(config, None)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return built.eval().requires_grad_(False)


def prompt() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(9)[None] < torch.tensor([7, 3, 9])[:, None]
    return torch.randn(3, 9, WIDTH), mask


def conditioner(kind: str) -> Conditioner:
    torch.manual_seed(2)
    if kind == "queries":
        return LearnableQueries.from_config({"width": WIDTH, "queries": 5})
    adapter = ResidualQueryAdapter.from_config({"width": WIDTH, "queries": 5, "heads": 4})
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return adapter


@pytest.mark.parametrize("kind", ["queries", "adapter"])
def test_loss_and_gradients_agree(backbone: InternVL, kind: str) -> None:
    embeddings, mask = prompt()
    weights = torch.randn(3, 14, WIDTH)
    results: list[tuple[Tensor, Tensor, list[Tensor]]] = []
    for reuse in (True, False):
        asked = conditioner(kind)
        states, whole = condition_states(backbone, asked, embeddings, mask, reuse=reuse)
        assert states.shape == (3, 14, WIDTH)
        assert torch.equal(whole, torch.cat([mask, torch.ones(3, 5, dtype=torch.bool)], 1))
        loss = (states * weights)[whole].square().mean()
        loss.backward()
        gradients = [parameter.grad for parameter in asked.parameters() if parameter.grad is not None]
        assert len(gradients) == len(list(asked.parameters()))
        results.append((states[whole], loss, gradients))
    (states, loss, gradients), (plain_states, plain_loss, plain_gradients) = results
    torch.testing.assert_close(states, plain_states, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, plain_loss, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-3
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_raw_gives_the_prompt(backbone: InternVL) -> None:
    embeddings, mask = prompt()
    for reuse in (True, False):
        states, whole = condition_states(backbone, Raw.from_config({}), embeddings, mask, reuse=reuse)
        torch.testing.assert_close(states, backbone.run(embeddings, mask).hidden)
        assert torch.equal(whole, mask)


def test_reuse_saves_less_for_backward(backbone: InternVL) -> None:
    embeddings, mask = prompt()

    def saved(reuse: bool) -> int:
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            condition_states(backbone, conditioner("queries"), embeddings, mask, reuse=reuse)
        return sum(kept.values())

    assert saved(True) < saved(False)


def test_reuse_is_refused_where_gradients_would_be_lost(backbone: InternVL) -> None:
    embeddings, mask = prompt()
    with pytest.raises(UserError, match="embeddings"):
        condition_states(backbone, conditioner("queries"), embeddings.requires_grad_(), mask)
    embeddings = embeddings.detach()
    backbone.named_parts()["llm"].requires_grad_(True)
    with pytest.raises(UserError, match="frozen language model"):
        condition_states(backbone, conditioner("queries"), embeddings, mask)
    with torch.no_grad():
        condition_states(backbone, conditioner("queries"), embeddings, mask)
    condition_states(backbone, conditioner("queries"), embeddings, mask, reuse=False)[0].sum().backward()
    assert backbone.model.get_input_embeddings().weight.grad is None
    assert backbone.model.model.language_model.norm.weight.grad is not None
