from __future__ import annotations

import pytest
import torch

from diptych.core.condition import TokenCondition
from diptych.core.errors import UserError
from diptych.parts.decoders.mmdit import MMDiT, MMDiTConfig
from diptych.parts.decoders.qwen_image import LORA_TARGETS, QwenImage
from diptych.parts.lora import add_lora, without_adapters
from tiny_sizes import QWEN_IMAGE

X, T, CONDITION = torch.randn(1, 4, 4, 4), torch.tensor([0.4]), TokenCondition(tokens=torch.randn(1, 3, 12))


def make() -> QwenImage:
    torch.manual_seed(0)
    return QwenImage.from_config(QWEN_IMAGE)


def adapted() -> QwenImage:
    decoder = make()
    add_lora(decoder, rank=4, alpha=4, dropout=0.0, targets=LORA_TARGETS)
    torch.manual_seed(1)
    for parameter in decoder.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return decoder


def test_starts_unchanged_and_trains_adapters_only() -> None:
    decoder = make()
    with torch.no_grad():
        before = decoder(X, T, CONDITION)
    add_lora(decoder, rank=4, alpha=4, dropout=0.0, targets=LORA_TARGETS)
    torch.testing.assert_close(decoder(X, T, CONDITION), before)
    trained = [name for name, parameter in decoder.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * len(LORA_TARGETS) * 2
    assert all(parameter.numel() == 4 * 32 for parameter in decoder.parameters() if parameter.requires_grad)


def test_native_decoder() -> None:
    config = MMDiTConfig(
        channels=4, patch=2, condition_width=12, hidden=32, heads=2, double=1, single=1, axes=(4, 6, 6)
    )
    decoder = MMDiT(config)
    add_lora(decoder, rank=2, alpha=2, dropout=0.0, targets=["qkv"])
    assert sum(parameter.requires_grad for parameter in decoder.parameters()) == 6


@pytest.mark.parametrize("frozen", [True, False])
def test_left_out_adapters_learn_as_before(frozen: bool) -> None:
    """They add nothing inside the block and keep `requires_grad` through it. Mutant: PEFT's own `enable_adapters`."""
    bare, decoder = make(), adapted()
    if frozen:
        decoder.requires_grad_(False)
    learns = [parameter.requires_grad for parameter in decoder.parameters()]
    assert any(learns) is not frozen
    with torch.no_grad():
        changed = decoder(X, T, CONDITION)
        with without_adapters(decoder):
            torch.testing.assert_close(decoder(X, T, CONDITION), bare(X, T, CONDITION))
        assert not torch.allclose(changed, bare(X, T, CONDITION))
        torch.testing.assert_close(decoder(X, T, CONDITION), changed)
    assert [parameter.requires_grad for parameter in decoder.parameters()] == learns


def test_mistakes() -> None:
    with pytest.raises(UserError, match="add_q_proj"):
        add_lora(make(), rank=4, alpha=4, dropout=0.0, targets=["to_q", "ad_q_proj"])
    with pytest.raises(UserError, match="rank"):
        add_lora(make(), rank=0, alpha=4, dropout=0.0, targets=["to_q"])
    with pytest.raises(UserError, match="already"):
        add_lora(adapted(), rank=4, alpha=4, dropout=0.0, targets=["to_q"])
