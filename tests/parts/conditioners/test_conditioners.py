"""Conditioners: counts, starts, masks, and the adapter's published size."""

from __future__ import annotations

import pytest
import torch

from diptych.core.errors import UserError
from diptych.parts.conditioners.learnable_queries import LearnableQueries
from diptych.parts.conditioners.raw import Raw
from diptych.parts.conditioners.residual_query_adapter import ResidualQueryAdapter


def prompt() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 5, 24), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()


def trained() -> ResidualQueryAdapter:
    adapter = ResidualQueryAdapter.from_config({"width": 24, "queries": 6, "heads": 4})
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.5)
    return adapter


def test_raw_appends_nothing() -> None:
    assert Raw.from_config({})(*prompt()).shape == (2, 0, 24)
    assert not list(Raw.from_config({}).parameters())


def test_learnable_queries() -> None:
    queries = LearnableQueries.from_config({"width": 24, "queries": 6})
    out = queries(*prompt())
    assert out.shape == (2, 6, 24)
    assert torch.equal(out[0], out[1])
    wide = LearnableQueries.from_config({"width": 1024, "queries": 256})
    assert wide.queries.std().item() == pytest.approx(1 / 32, rel=0.02)


def test_adapter_starts_at_its_queries_and_learns() -> None:
    adapter = ResidualQueryAdapter.from_config({"width": 24, "queries": 6, "heads": 4})
    out = adapter(*prompt())
    assert torch.equal(out, adapter.queries.expand(2, -1, -1))
    out.square().sum().backward()
    for parameter in (adapter.queries, adapter.to_out.weight, adapter.mlp_out.weight):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


def test_adapter_reads_only_real_tokens() -> None:
    adapter = trained()
    sequence, mask = prompt()
    out = adapter(sequence, mask)
    torch.testing.assert_close(out[1], adapter(sequence[1:, :2], mask[1:, :2])[0], atol=1e-5, rtol=1e-5)
    sequence[1, 2:] = 100.0
    torch.testing.assert_close(adapter(sequence, mask)[1], out[1])
    sequence[1, 1] += 1
    assert not torch.allclose(adapter(sequence, mask)[1], out[1])


def test_adapter_size() -> None:
    with torch.device("meta"):
        adapter = ResidualQueryAdapter.from_config({"width": 1536})
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 28_727_808
    assert adapter.count == 256
    adapter.to_empty(device="cpu").init_weights()
    assert torch.equal(adapter(torch.randn(1, 3, 1536), torch.ones(1, 3).bool())[0], adapter.queries)


def test_adapter_options() -> None:
    assert (
        ResidualQueryAdapter.from_config({"width": 24, "queries": 3, "heads": 2, "mlp_ratio": 2}).mlp_in.out_features
        == 48
    )
    with pytest.raises(UserError, match="24 heads do not divide the width 100"):
        ResidualQueryAdapter.from_config({"width": 100})
