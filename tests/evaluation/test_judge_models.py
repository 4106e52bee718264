"""Judges on this machine: a vision-language model of transformers, of a real class with random weights."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from diptych.core.errors import UserError
from diptych.evaluation.judge import Question
from diptych.evaluation.judge_models import TransformersJudge

WORDS = ["what", "is", "it", "?", "Yes", "yes", "No", "no", "a", "red", "blue", "cow", "USER", "ASSISTANT", ":", "."]
TEMPLATE = (
    "{% for message in messages %}USER : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}ASSISTANT :"
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with LLaVA: CLIP's encoder of 4 patches and a Llama of one layer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", "<image>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=16, patch_size=8, projection_dim=8),
        text_config=LlamaConfig(**small, vocab_size=32, max_position_embeddings=128, num_key_value_heads=2),
        image_token_index=vocabulary["<image>"],
        image_seq_length=4,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return str(folder)


def red() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_answers_about_pictures(llava: str) -> None:
    judge = TransformersJudge(llava, max_tokens=3)
    assert judge.about() == {"model": f"hf:{llava}", "temperature": 0.0, "max_tokens": 3}
    question = Question(text="what is it ?", images=(red(), red()))
    reply = judge.ask(question)
    assert judge.ask(question) == reply, "greedy"
    assert reply.failure in (None, "cut off after 3 tokens", "an empty reply")
    words = judge.ask(Question(text="what is it ?"))
    assert words.failure in (None, "cut off after 3 tokens", "an empty reply")


def test_choices_are_weighed_by_their_first_tokens(llava: str) -> None:
    import torch

    judge = TransformersJudge(llava)
    question = Question(text="is it red ?", images=(red(),), choices=("yes", "no"))
    ids = judge.processor.tokenizer.convert_tokens_to_ids
    weight = judge.model.get_output_embeddings().weight
    said: list[str] = []
    with torch.no_grad():  # every form's logit is 0 but that of "No", which is once positive and once negative
        weight[[ids(word) for word in ("yes", "Yes", "no")]] = 0
        weight[ids("No")] = 1
        said.append(judge.ask(question).text)
        weight[ids("No")] = -1
        reply = judge.ask(question)
    assert {*said, reply.text} == {"yes", "no"}
    assert reply.failure is None


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--judge hf:.*could not be loaded"):
        TransformersJudge(str(tmp_path))
