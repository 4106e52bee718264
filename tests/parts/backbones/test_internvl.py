"""InternVL behind the backbone interface equals transformers' own calls."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GotOcr2ImageProcessorPil, PreTrainedTokenizerFast

from diptych.core.errors import UserError
from diptych.core.sample import Message
from diptych.parts.backbones.internvl import InternVL, load_assets
from diptych.parts.backbones.processor import Sequences
from diptych.parts.backbones.toy_tokenizer import train_tokenizer

TEXTS = ["how many red circles are there?", "a red circle left of a blue square", "two", "describe the image."] * 3
CONFIG: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
    },
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 320,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    },
    "image_token_id": 5,
    "image_seq_length": 4,
    "downsample_ratio": 0.5,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 320)


@pytest.fixture
def backbone(tokenizer: PreTrainedTokenizerFast) -> InternVL:
    return build(tokenizer)


def build(tokenizer: PreTrainedTokenizerFast | None, **options: Any) -> InternVL:
    torch.manual_seed(0)
    built = InternVL.from_config(CONFIG, tokenizer, **options)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return built.eval()


def asked(text: str, answer: str | None = None) -> list[Message]:
    turns = [Message(role="user", text=text)]
    return turns if answer is None else [*turns, Message(role="assistant", text=answer)]


def picture(height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    levels = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed))
    return levels.float() / 127.5 - 1


def ragged(lengths: tuple[int, ...] = (7, 4, 9), width: int = 48) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), max(lengths), width), mask


# Text


def test_template_slots_and_learned_tokens(backbone: InternVL) -> None:
    conversation = [
        Message(role="system", text="be brief."),
        Message(role="user", text="<image>\n<image>\nhow many red circles are there?"),
        Message(role="assistant", text="two"),
        Message(role="user", text="describe the image."),
        Message(role="assistant", text="a red circle"),
    ]
    other = asked("describe the image.", "a red circle")
    out = backbone.tokenize([conversation, other], images=[[picture(), picture()], []])
    image = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    expected = (
        f"<|im_start|>system\nbe brief.<|im_end|>\n<|im_start|>user\n{image}\n{image}\nhow many red circles are there?"
        "<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user\ndescribe the image.<|im_end|>\n"
        "<|im_start|>assistant\na red circle<|im_end|>\n"
    )
    decode = backbone.tokenizer.decode
    assert decode(out.ids[0]) == expected
    assert decode(out.ids[0][out.loss_mask[0]]) == "two<|im_end|>a red circle<|im_end|>"
    assert decode(out.ids[1][out.loss_mask[1]]) == "a red circle<|im_end|>"
    assert out.images.sum(1).tolist() == [8, 0]
    length = int(out.mask[1].sum())
    assert length < out.ids.shape[1]
    assert (out.ids[1, length:] == 0).all()
    assert not out.mask[1, length:].any()


def test_requests_that_are_alike_are_tokenized_as_if_alone(backbone: InternVL) -> None:
    one = [Message(role="user", text="<image>\nwhat color?"), Message(role="assistant", text="red")]
    two = [*one, Message(role="user", text="red"), Message(role="assistant", text="red")]
    small, large = torch.zeros(3, 32, 32), torch.zeros(3, 64, 64)
    rows = [one, two, one, one]
    images = [[small], [small], [large], [small]]
    together = backbone.tokenize(rows, images=images)
    for row, (conversation, image) in enumerate(zip(rows, images, strict=True)):
        alone = backbone.tokenize([conversation], images=[image])
        count = alone.ids.shape[1]
        assert together.ids[row, :count].equal(alone.ids[0])
        assert together.loss_mask[row, :count].equal(alone.loss_mask[0])
        assert not together.mask[row, count:].any()


def test_generation_prompt_is_a_prefix_of_the_learned_turn(backbone: InternVL) -> None:
    prompt = backbone.tokenize([asked("describe the image.")], generate=True).ids[0]
    whole = backbone.tokenize([asked("describe the image.", "\n a red circle")])
    assert whole.ids[0, : len(prompt)].tolist() == prompt.tolist()
    assert not whole.loss_mask[0, : len(prompt)].any()
    assert whole.loss_mask[0, len(prompt)]


def test_template_of_the_tokenizer_files_is_used(tokenizer: PreTrainedTokenizerFast) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    built = build(other)
    assert other.decode(built.tokenize([asked("a red circle")]).ids[0]) == "[a red circle]"
    other.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="rewrites earlier turns"):
        built.tokenize([asked("two", "two")])
    other.chat_template = None
    assert other.decode(built.tokenize([asked("two")]).ids[0]) == "<|im_start|>user\ntwo<|im_end|>\n"


@pytest.mark.parametrize(
    ("conversation", "images", "message"),
    [
        (asked("<image> <image> two"), [picture()], "2 <image> placeholders but 1 images"),
        (asked("two"), [picture()], "0 <image> placeholders but 1 images"),
        (asked("<IMG_CONTEXT> two"), [], "reserved token <IMG_CONTEXT>"),
        (asked("two<|im_end|>"), [], "reserved token <.im_end.>"),
        (asked("two " * 200 + "the end"), [], "would be cut.*the end"),
    ],
)
def test_bad_conversations(backbone: InternVL, conversation: list[Message], images: list[Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        backbone.tokenize([conversation], images=[images])


def test_token_without_a_row(tokenizer: PreTrainedTokenizerFast) -> None:
    larger = copy.deepcopy(tokenizer)
    larger.add_special_tokens({"additional_special_tokens": ["<video>"]})
    built = build(larger)
    assert built.tokenize([asked("two")]).ids.max() < 320
    with pytest.raises(UserError, match="'<video>', which this model has no embedding"):
        built.tokenize([asked("<video> two")])


def test_without_tokenizer() -> None:
    with pytest.raises(UserError, match="without a tokenizer"):
        build(None).tokenize([asked("two")])


# Vision


@pytest.mark.parametrize("size", [(32, 32), (47, 80), (16, 5)])
def test_pixels_and_vision_tokens_equal_transformers(backbone: InternVL, size: tuple[int, int]) -> None:
    image = picture(*size)
    array = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    expected = backbone.image_processor(
        images=[array], input_data_format="channels_last", crop_to_patches=False, return_tensors="pt"
    )["pixel_values"]
    torch.testing.assert_close(backbone.processor.pixels([image]).values, expected, atol=1e-5, rtol=0)
    tokens = backbone.vision_tokens([image, image])
    features = backbone.model.get_image_features(expected).pooler_output
    assert len(tokens) == 2
    for part in tokens:
        torch.testing.assert_close(part, features[0], atol=1e-5, rtol=1e-5)


def test_mixed_sizes_keep_their_order(backbone: InternVL) -> None:
    images = [picture(32, 32, 1), picture(64, 32, 2), picture(32, 32, 3)]
    together = backbone.vision_tokens(images)
    for image, tokens in zip(images, together, strict=True):
        torch.testing.assert_close(backbone.vision_tokens([image])[0], tokens, atol=1e-5, rtol=1e-5)


def test_tiles(tokenizer: PreTrainedTokenizerFast) -> None:
    built = build(tokenizer, max_tiles=4)
    images = [picture(32, 64), picture(32, 32)]
    tokens = built.vision_tokens(images)
    out = built.tokenize([asked("<image>"), asked("<image>")], images=[[image] for image in images])
    assert [len(part) for part in tokens] == out.images.sum(1).tolist()
    assert len(tokens[0]) == (2 + 1) * 4, "two tiles and a thumbnail"


def test_no_pixel_shuffle() -> None:
    built = InternVL.from_config({**CONFIG, "downsample_ratio": 1, "image_seq_length": 16}, None)
    assert built.vision_tokens([picture()])[0].shape == (16, 48)


# Runs


def test_run_equals_the_plain_model_on_ragged_rows(backbone: InternVL) -> None:
    x, mask = ragged()
    hidden = backbone.run(x, mask).hidden
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = backbone.model.model.language_model(inputs_embeds=x[row : row + 1, :length]).last_hidden_state
        torch.testing.assert_close(hidden[row, :length], alone[0], atol=1e-5, rtol=1e-5)


def test_continuing_a_prefix_equals_the_plain_model(backbone: InternVL) -> None:
    x, mask = ragged()
    new = torch.randn(3, 5, 48)
    prefix = backbone.run(x, mask, cache=True)
    before = [keys.clone() for keys, _ in prefix.cache.layers]
    once = backbone.run(new[:, :2], torch.ones(3, 2, dtype=torch.bool), prefix, cache=True)
    twice = backbone.run(new[:, 2:], torch.ones(3, 3, dtype=torch.bool), once)
    again = backbone.run(new, torch.ones(3, 5, dtype=torch.bool), prefix)
    assert once.hidden.shape == (3, 2, 48)
    assert once.mask.shape == (3, 2)
    for row, length in enumerate(mask.sum(1).tolist()):
        joined = torch.cat([x[row : row + 1, :length], new[row : row + 1]], dim=1)
        alone = backbone.model.model.language_model(inputs_embeds=joined).last_hidden_state[0, length:]
        torch.testing.assert_close(again.hidden[row], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.cat([once.hidden, twice.hidden], 1)[row], alone, atol=1e-5, rtol=1e-5)
    for old, (keys, _) in zip(before, prefix.cache.layers, strict=True):
        assert torch.equal(old, keys), "the prefix's cache was changed"


def test_padded_continuation(backbone: InternVL) -> None:
    x, mask = ragged()
    new, new_mask = ragged((2, 3, 1))
    out = backbone.run(new, new_mask, backbone.run(x, mask, cache=True), cache=True)
    last = backbone.run(new[:, :1], torch.ones(3, 1, dtype=torch.bool), out)
    for row in range(3):
        parts = [x[row][mask[row]], new[row][new_mask[row]], new[row, :1]]
        alone = backbone.model.model.language_model(inputs_embeds=torch.cat(parts)[None]).last_hidden_state[0]
        torch.testing.assert_close(last.hidden[row, 0], alone[-1], atol=1e-5, rtol=1e-5)


def test_one_prefix_for_many_rows(backbone: InternVL) -> None:
    x, mask = ragged((6,))
    new = torch.randn(3, 4, 48)
    real = torch.ones(3, 4, dtype=torch.bool)
    shared = backbone.run(new, real, backbone.run(x, mask, cache=True)).hidden
    repeated = backbone.run(new, real, backbone.run(x.expand(3, -1, -1), mask.expand(3, -1), cache=True)).hidden
    torch.testing.assert_close(shared, repeated, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_refuses_a_cache(backbone: InternVL) -> None:
    x, mask = ragged()
    backbone.model.activation_checkpointing_enable()
    backbone.train()
    with pytest.raises(UserError, match="gradient checkpointing"):
        backbone.run(x, mask, cache=True)


def test_training_reaches_every_parameter(backbone: InternVL) -> None:
    out = backbone.tokenize([asked("<image>\ndescribe the image.", "a red circle")], images=[[picture()]])
    embeddings = backbone.place(backbone.embed(out.ids), out.images, backbone.vision_tokens([picture()]))
    logits = backbone.logits(backbone.run(embeddings, out.mask).hidden)
    targets = out.loss_mask[:, 1:]
    torch.nn.functional.cross_entropy(logits[:, :-1][targets], out.ids[:, 1:][targets]).backward()
    silent = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
    assert not silent


# Generation


def test_generation_equals_transformers(backbone: InternVL) -> None:
    image = picture()
    prompt = backbone.tokenize([asked("<image>\nhow many red circles are there?")], images=[[image]], generate=True)
    expected = backbone.model.generate(
        input_ids=prompt.ids,
        attention_mask=prompt.mask.long(),
        pixel_values=backbone.processor.pixels([image]).values,
        do_sample=False,
        max_new_tokens=20,
    )[0, prompt.ids.shape[1] :]
    text = backbone.generate(prompt, backbone.vision_tokens([image]), max_new_tokens=20)
    assert text == [backbone.tokenizer.decode(expected, skip_special_tokens=True)]
    assert text[0]


def test_batched_generation_equals_single(backbone: InternVL) -> None:
    conversations = [asked("two"), asked("<image>\nhow many red circles are there?"), asked("describe the image.")]
    images = [[], [picture()], []]
    together = backbone.generate(
        backbone.tokenize(conversations, images=images, generate=True),
        backbone.vision_tokens([picture()]),
        max_new_tokens=12,
    )
    for conversation, own, text in zip(conversations, images, together, strict=True):
        prompt = backbone.tokenize([conversation], images=[own], generate=True)
        assert backbone.generate(prompt, backbone.vision_tokens(own), max_new_tokens=12) == [text]


def test_generation_stops_at_the_end_of_turn(backbone: InternVL) -> None:
    prompt = backbone.tokenize([asked("two")], generate=True)
    first = backbone.model(input_ids=prompt.ids).logits[0, -1].argmax()
    backbone.chat.end_ids = frozenset({int(first)})
    assert backbone.generate(prompt, [], max_new_tokens=5) == [""]


def test_generation_without_room(backbone: InternVL) -> None:
    full = torch.ones((1, 128), dtype=torch.bool)
    prompt = Sequences(ids=torch.full((1, 128), 7), mask=full, images=~full, loss_mask=~full)
    with pytest.raises(UserError, match="no room"):
        backbone.generate(prompt, [], max_new_tokens=5)


# Building, saving, loading


def test_parts_are_disjoint_and_cover(backbone: InternVL) -> None:
    parts = backbone.named_parts()
    assert set(parts) == {"llm", "vision", "projector"}
    owned = [id(parameter) for part in parts.values() for parameter in part.parameters()]
    assert sorted(owned) == sorted(id(parameter) for parameter in backbone.parameters())
    assert len(backbone.shard_units()) == 5


def test_untied_head_belongs_to_the_language_model() -> None:
    text = {**CONFIG["text_config"], "tie_word_embeddings": False}
    built = InternVL.from_config({**CONFIG, "text_config": text, "tie_word_embeddings": False}, None)
    owned = {id(parameter) for part in built.named_parts().values() for parameter in part.parameters()}
    assert owned == {id(parameter) for parameter in built.parameters()}
    assert id(built.model.lm_head.weight) in owned


def test_meta() -> None:
    with torch.device("meta"):
        built = InternVL.from_config(CONFIG, None)
    assert {parameter.device.type for parameter in built.parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_round_trip(backbone: InternVL, tmp_path: Path, dtype: torch.dtype | None) -> None:
    backbone.save_pretrained(tmp_path, dtype)
    stored = load_file(tmp_path / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {dtype or torch.float32}
    assert "language_model.model.embed_tokens.weight" in stored, "the published layout"
    assert not [name for name in stored if "lm_head" in name], "the tied head is stored once"
    again = InternVL.from_pretrained(tmp_path).eval()
    for name, parameter in backbone.named_parameters():
        expected = parameter if dtype is None else parameter.to(dtype).float()
        assert torch.equal(again.get_parameter(name), expected), name
    assert again.model.lm_head.weight is again.model.get_input_embeddings().weight
    conversation = [asked("<image> a blue square", "two")]
    ours, theirs = (b.tokenize(conversation, images=[[picture()]]) for b in (backbone, again))
    assert torch.equal(ours.ids, theirs.ids)
    assert torch.equal(ours.loss_mask, theirs.loss_mask)
    assert torch.equal(
        backbone.processor.pixels([picture(40, 50)]).values, again.processor.pixels([picture(40, 50)]).values
    )
    config = json.dumps(backbone.plain_config())
    assert str(tmp_path) not in json.dumps(again.plain_config())
    assert json.dumps(InternVL.from_config(json.loads(config), None).plain_config()) == config
    assert again.plain_config() == backbone.plain_config()


def test_missing_unexpected_and_misshapen_keys_are_named(backbone: InternVL, tmp_path: Path) -> None:
    backbone.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["language_model.model.norm.weight"]
    weights["vision_tower.extra"] = torch.zeros(1)
    weights["multi_modal_projector.linear_2.bias"] = torch.zeros(3)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        InternVL.from_pretrained(tmp_path)
    for part in ("missing", "norm.weight", "unexpected", "vision_tower.extra", "wrongly shaped", "linear_2.bias"):
        assert part in str(caught.value)


def test_folders_that_are_no_model(backbone: InternVL, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        InternVL.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        InternVL.from_pretrained(tmp_path / "absent")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UserError, match="'qwen2' model, not InternVL"):
        InternVL.from_pretrained(tmp_path)
    backbone.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        InternVL.from_pretrained(tmp_path)


def test_unreachable_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/no-such-model: hub id not reachable") as caught:
        InternVL.from_pretrained("nobody/no-such-model")
    assert "\n" not in str(caught.value)


def changed(part: str, **values: Any) -> dict[str, Any]:
    return {**CONFIG, **values} if part == "" else {**CONFIG, part: {**CONFIG[part], **values}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed("", downsample_ration=1), "downsample_ratio"),
        (changed("text_config", hiden_size=1), "text_config: unknown key 'hiden_size'.*hidden_size"),
        (changed("text_config", model_type="qwen99"), "qwen99"),
        (changed("vision_config", hidden_size="wide"), "hidden_size"),
        (changed("vision_config", image_size=36), "square grid"),
        (changed("", image_seq_length=9), "gives 4 tokens"),
        (changed("", text_config="qwen2"), "text_config: a mapping is needed"),
    ],
)
def test_bad_configs(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        InternVL.from_config(config, None)


def test_parts_that_do_not_fit(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="image_token_id is 4"):
        InternVL.from_config(changed("", image_token_id=4), tokenizer)
    with pytest.raises(UserError, match="vocab_size is 300"):
        InternVL.from_config(changed("text_config", vocab_size=300), tokenizer)
    with pytest.raises(UserError, match="448x448"):
        InternVL.from_config(CONFIG, tokenizer, GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}))
    plain = copy.deepcopy(tokenizer)
    plain.get_vocab = lambda: {"a": 0}
    with pytest.raises(UserError, match="lacks the special tokens <IMG_CONTEXT>"):
        InternVL.from_config(CONFIG, plain)


def test_assets_alone(backbone: InternVL, tmp_path: Path) -> None:
    backbone.save_assets(tmp_path)
    tokenizer, processor = load_assets(tmp_path)
    assert tokenizer.get_vocab() == backbone.tokenizer.get_vocab()
    assert processor.to_dict() == backbone.image_processor.to_dict()
