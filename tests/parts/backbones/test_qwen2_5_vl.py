"""Qwen2.5-VL behind the backbone interface equals transformers' own calls, images and their positions included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

from diptych.core.errors import UserError
from diptych.core.sample import Message
from diptych.parts.backbones.processor import Sequences
from diptych.parts.backbones.qwen2_5_vl import Qwen2_5VL
from diptych.parts.backbones.toy_tokenizer import train_tokenizer
from diptych.parts.conditioners.learnable_queries import LearnableQueries
from diptych.parts.conditioners.prefix import condition_states

TEXTS = ["how many red circles are there?", "a red circle left of a blue square", "describe the image."] * 3
ROWS = 330


def config(image_id: int) -> dict[str, Any]:
    return {
        "image_token_id": image_id,
        "video_token_id": ROWS - 1,
        "tie_word_embeddings": False,
        "text_config": {
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "vocab_size": ROWS,
            "max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 48,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    }


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = train_tokenizer(TEXTS, 320)
    made.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]})
    return made


@pytest.fixture(scope="module")
def backbone(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5VL:
    torch.manual_seed(0)
    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    built = Qwen2_5VL.from_config(config(tokenizer.get_vocab()["<|image_pad|>"]), tokenizer, processor)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return built.eval().requires_grad_(False)


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    levels = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed))
    return levels.float() / 127.5 - 1


def asked(text: str) -> list[Message]:
    return [Message(role="user", text=text)]


IMAGES = [[picture(16, 24, 1)], [picture(24, 16, 2), picture(40, 70, 3)], []]


def prompts(backbone: Qwen2_5VL) -> tuple[Sequences, list[Tensor], Tensor]:
    """Three ragged conversations with one, two and no images: sequences, vision tokens, input embeddings."""
    conversations = [asked("<image> a red circle"), asked("<image> left of <image>, a blue square"), asked("two")]
    sequences = backbone.tokenize(conversations, images=IMAGES, generate=True)
    vision = backbone.vision_tokens([image for row in IMAGES for image in row])
    return sequences, vision, backbone.place(backbone.embed(sequences.ids), sequences.images, vision)


def theirs(backbone: Qwen2_5VL, sequences: Sequences, types: bool = True) -> Tensor:
    """transformers' own forward, given the very inputs its processor would give, or all but the types of tokens."""
    arrays = [((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy() for row in IMAGES for image in row]
    pixels = backbone.image_processor(images=arrays, input_data_format="channels_last", return_tensors="pt")
    backbone.model.model.rope_deltas = None
    out = backbone.model.model(
        input_ids=sequences.ids,
        attention_mask=sequences.mask.long(),
        mm_token_type_ids=sequences.images.int() if types else None,
        **pixels,
    )
    return out.last_hidden_state


def test_run_with_images_is_theirs(backbone: Qwen2_5VL) -> None:
    sequences, vision, embeddings = prompts(backbone)
    assert [len(tokens) for tokens in vision] == [6, 6, 3 * 5]
    ours = backbone.run(embeddings, sequences.mask, positions=sequences.positions).hidden
    expected = theirs(backbone, sequences)
    torch.testing.assert_close(ours[sequences.mask], expected[sequences.mask], atol=1e-5, rtol=1e-5)

    flat = backbone.run(embeddings, sequences.mask).hidden
    assert (flat[:2] - ours[:2]).abs().max() > 1e-3  # positions in the grid matter
    # Without the types transformers counts tokens, and says nothing: our positions are computed here.
    without = theirs(backbone, sequences, types=False)
    torch.testing.assert_close(without[sequences.mask], flat[sequences.mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reuse", [True, False])
def test_appended_tokens_follow_the_largest_position(backbone: Qwen2_5VL, reuse: bool) -> None:
    """Row by row without padding, with positions made by hand from transformers' rule."""
    torch.manual_seed(1)
    queries = LearnableQueries.from_config({"width": 48, "queries": 3})
    sequences, _, embeddings = prompts(backbone)
    states, mask = condition_states(
        backbone, queries, embeddings, sequences.mask, positions=sequences.positions, reuse=reuse
    )
    assert sequences.positions is not None
    for row, real in enumerate(sequences.mask):
        prompt = embeddings[row, real][None]
        places = sequences.positions[row, real]  # (L, 3)
        after = places.max() + 1 + torch.arange(3)[:, None].expand(3, 3)
        out = backbone.model.model.language_model(
            inputs_embeds=torch.cat([prompt, queries.queries[None]], dim=1),
            position_ids=torch.cat([places, after]).T[:, None],
        ).last_hidden_state
        torch.testing.assert_close(states[row, mask[row]][None], out, atol=1e-5, rtol=1e-5)


def test_query_gradients_are_those_of_the_plain_run(backbone: Qwen2_5VL) -> None:
    queries = LearnableQueries.from_config({"width": 48, "queries": 3})
    sequences, _, embeddings = prompts(backbone)
    probe = torch.randn(3, 3, 48)
    gradients = []
    for reuse in (True, False):
        states, _ = condition_states(
            backbone, queries, embeddings, sequences.mask, positions=sequences.positions, reuse=reuse
        )
        gradients.append(torch.autograd.grad((states[:, -3:] * probe).sum(), queries.queries)[0])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_generation_is_theirs(backbone: Qwen2_5VL) -> None:
    sequences, vision, _ = prompts(backbone)
    answers = backbone.generate(sequences, vision, max_new_tokens=6)
    embeddings = backbone.place(backbone.embed(sequences.ids), sequences.images, vision)
    for row, real in enumerate(sequences.mask):
        assert sequences.positions is not None
        prompt, places = embeddings[row, real][None], sequences.positions[row, real]
        ids: list[int] = []
        for _ in range(6):
            hidden = backbone.model.model.language_model(
                inputs_embeds=prompt, position_ids=places.T[:, None]
            ).last_hidden_state
            token = int(backbone.logits(hidden[0, -1]).argmax())
            if token in backbone.chat.end_ids:
                break
            ids.append(token)
            prompt = torch.cat([prompt, backbone.embed(torch.tensor([[token]]))], dim=1)
            places = torch.cat([places, places.max() + 1 + torch.zeros(1, 3, dtype=torch.long)])
        assert answers[row] == backbone.chat.decode(ids)


def test_text_alone_needs_no_positions(backbone: Qwen2_5VL) -> None:
    sequences = backbone.tokenize([asked("two"), asked("a red circle")])
    assert sequences.positions is None


def test_parts_are_disjoint_and_whole(backbone: Qwen2_5VL) -> None:
    owned = [id(p) for part in backbone.named_parts().values() for p in part.parameters()]
    assert sorted(owned) == sorted(id(p) for p in backbone.parameters())


def test_saved_folder_is_read_back(backbone: Qwen2_5VL, tmp_path: Path) -> None:
    backbone.save_pretrained(tmp_path)
    again = Qwen2_5VL.from_pretrained(tmp_path).eval()
    ours, same = prompts(backbone), prompts(again)
    assert torch.equal(ours[0].ids, same[0].ids)
    torch.testing.assert_close(
        again.run(same[2], same[0].mask, positions=same[0].positions).hidden,
        backbone.run(ours[2], ours[0].mask, positions=ours[0].positions).hidden,
    )


def test_text_encoder_of_a_pipeline_finds_its_tokenizer(backbone: Qwen2_5VL, tmp_path: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    backbone.model.save_pretrained(tmp_path / "text_encoder")
    backbone.tokenizer.save_pretrained(tmp_path / "tokenizer")
    read = Qwen2_5VL.from_pretrained(tmp_path / "text_encoder")
    assert torch.equal(read.tokenize([asked("two")]).ids, backbone.tokenize([asked("two")]).ids)
    assert read.image_processor.patch_size == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [({"text_conf": {}}, "text_config"), ({"text_config": {"hiden_size": 3}}, "hidden_size")],
)
def test_unknown_keys_name_the_nearest(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Qwen2_5VL.from_config({**config(5), **change}, None)


def test_extreme_aspect_is_refused(backbone: Qwen2_5VL) -> None:
    with pytest.raises(UserError, match="aspect"):
        backbone.tokenize([asked("<image>")], images=[[torch.zeros(3, 2, 600)]])
