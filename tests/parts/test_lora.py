from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from peft import PeftModel
from safetensors.torch import load_file, save_file

from diptych.core.condition import TokenCondition
from diptych.core.errors import UserError
from diptych.parts.decoders.mmdit import MMDiT, MMDiTConfig
from diptych.parts.decoders.qwen_image import LORA_TARGETS, QwenImage
from diptych.parts.lora import add_lora, load_lora, save_lora

SIZES = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "axes_dims_rope": (4, 6, 6),
}
X, T, CONDITION = torch.randn(1, 4, 4, 4), torch.tensor([0.4]), TokenCondition(tokens=torch.randn(1, 3, 12))


def make() -> QwenImage:
    torch.manual_seed(0)
    return QwenImage.from_config(SIZES)


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


def test_round_trip(tmp_path: Path) -> None:
    decoder = adapted()
    with torch.no_grad():
        out = decoder(X, T, CONDITION)
        assert not torch.allclose(out, make()(X, T, CONDITION), atol=1e-3)
        save_lora(decoder, tmp_path)

        again = make()
        load_lora(again, tmp_path)
        assert torch.equal(again(X, T, CONDITION), out)
        load_lora(again, tmp_path)  # into adapters that are there
        assert torch.equal(again(X, T, CONDITION), out)
    assert any(parameter.requires_grad for parameter in again.parameters())


def test_peft_itself_reads_it(tmp_path: Path) -> None:
    decoder = adapted()
    save_lora(decoder, tmp_path)
    plain = make()
    base: QwenImageTransformer2DModel = plain.model
    with torch.no_grad():
        PeftModel.from_pretrained(base, str(tmp_path))  # wraps the layers of `base` in place
        torch.testing.assert_close(plain(X, T, CONDITION), decoder(X, T, CONDITION))


def test_native_decoder(tmp_path: Path) -> None:
    config = MMDiTConfig(
        channels=4, patch=2, condition_width=12, hidden=32, heads=2, double=1, single=1, axes=(4, 6, 6)
    )
    decoder = MMDiT(config)
    add_lora(decoder, rank=2, alpha=2, dropout=0.0, targets=["qkv"])
    assert sum(parameter.requires_grad for parameter in decoder.parameters()) == 6
    save_lora(decoder, tmp_path)
    load_lora(MMDiT(config), tmp_path)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="add_q_proj"):
        add_lora(make(), rank=4, alpha=4, dropout=0.0, targets=["to_q", "ad_q_proj"])
    with pytest.raises(UserError, match="rank"):
        add_lora(make(), rank=0, alpha=4, dropout=0.0, targets=["to_q"])
    with pytest.raises(UserError, match="already"):
        add_lora(adapted(), rank=4, alpha=4, dropout=0.0, targets=["to_q"])
    with pytest.raises(UserError, match="no adapters"):
        save_lora(make(), tmp_path)
    with pytest.raises(UserError, match="no adapter here"):
        load_lora(make(), tmp_path)

    save_lora(adapted(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    first = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != first}, file)
    with pytest.raises(UserError, match="missing keys"):
        load_lora(make(), tmp_path)
    save_file({**weights, first: torch.zeros(1, 1)}, file)
    with pytest.raises(UserError, match=r"shape \(1, 1\)"):
        load_lora(make(), tmp_path)
    file.write_bytes(b"garbage garbage")
    with pytest.raises(UserError, match="safetensors"):
        load_lora(make(), tmp_path)
