"""What transformers does without a word, and what our readers and exporters make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM

from diptych.parts.backbones.causal import run_causal
from diptych.parts.backbones.published import read_model, write_model
from diptych.parts.backbones.t5 import read_encoder

SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "eos_token_id": 0,
    "bos_token_id": 0,
}


def language_model(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES, **options)).eval()


def test_a_head_that_is_not_the_embedding_stays_so(tmp_path: Path) -> None:
    """The configuration ties them and the file does not: transformers follows the file, and so do ours."""
    tied = language_model(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    assert "lm_head.weight" not in weights
    head = weights["model.embed_tokens.weight"] + 1
    save_file({**weights, "lm_head.weight": head}, file, {"format": "pt"})
    read = read_model(LlamaForCausalLM, tmp_path, str(tmp_path), tied.config, torch.float32)
    assert read.lm_head.weight is not read.model.embed_tokens.weight
    assert torch.equal(read.lm_head.weight, head)
    write_model(read, tmp_path / "again", None)
    again = read_model(LlamaForCausalLM, tmp_path, str(tmp_path / "again"), read.config, torch.float32)
    assert torch.equal(again.lm_head.weight, head)
    assert torch.equal(again.model.embed_tokens.weight, weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("learned", ["norm", "embed_tokens"])
def test_what_learned_in_float32_is_read_so_by_others(learned: str, tmp_path: Path) -> None:
    """Beside frozen bfloat16 weights, whichever comes first. Mutant: transformers' own record, of the first weight."""
    model = language_model()
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn(parameter.shape).to(torch.float32 if learned in name else torch.bfloat16)
    write_model(model, tmp_path, None)
    again = dict(LlamaForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert {str(parameter.dtype) for parameter in again.values()} == {"torch.float32"}
    assert all(torch.equal(again[name], parameter.float()) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_keys_of_a_clip_text_encoder_are_read_in_both_forms(prefix: str, tmp_path: Path) -> None:
    """transformers writes the form that it has read: a file of ours is read from either, with the same states."""
    torch.manual_seed(0)
    model = CLIPTextModel(CLIPTextConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    plain = {name.removeprefix("text_model."): value for name, value in load_file(file).items()}
    save_file({prefix + name: value for name, value in plain.items()}, file, {"format": "pt"})
    read = read_encoder(CLIPTextModel, tmp_path, torch.float32)
    read.save_pretrained(tmp_path / "again")
    assert all(name.startswith(prefix) for name in load_file(tmp_path / "again" / "model.safetensors"))
    ids = torch.tensor([[1, 2, 0]])
    with torch.no_grad():
        assert torch.equal(read(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state)


def test_positions_that_start_again_split_a_row_only_without_a_cache_and_a_mask() -> None:
    """transformers takes them for packed samples; ours always come with a mask, and stay one sample."""
    model = language_model().model
    embeddings = torch.randn(1, 5, 8)
    places = torch.tensor([[0, 1, 2, 0, 1]])

    def run(**options: Any) -> torch.Tensor:
        return model(inputs_embeds=embeddings, position_ids=places, **options).last_hidden_state

    real = torch.ones(1, 5, dtype=torch.bool)
    with torch.no_grad():
        split, whole = run(use_cache=False), run(use_cache=True)
        assert (split - whole).abs().max() > 1e-3
        torch.testing.assert_close(run(use_cache=False, attention_mask=real), whole)
        ours = [run_causal(model, embeddings, real, cache=cache).hidden for cache in (False, True)]
    torch.testing.assert_close(*ours)
