"""What a processor gives for several conversations equals what it gives for each, padded; it can be pickled."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2VLImageProcessorPil
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from diptych.core.sample import Message
from diptych.parts.backbones.chat import Chat
from diptych.parts.backbones.internvl_processor import InternVLProcessor
from diptych.parts.backbones.native_resolution import Pixels
from diptych.parts.backbones.ovis_chat import OvisChat
from diptych.parts.backbones.ovis_processor import OvisProcessor
from diptych.parts.backbones.processor import Processor, join_inputs
from diptych.parts.backbones.qwen2_5_vl_processor import Qwen2_5VLProcessor, positions
from diptych.parts.backbones.toy_tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["how many red circles are there?", "a red circle left of a blue square"] * 3, 320)
QWEN_TOKENIZER = train_tokenizer(["how many red circles are there?", "a red circle left of a blue square"] * 3, 320)
QWEN_TOKENIZER.add_special_tokens(
    {"additional_special_tokens": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]}
)
PROCESSORS: dict[str, Processor] = {
    "internvl": InternVLProcessor(
        Chat(TOKENIZER), None, side=32, tile_tokens=4, max_tiles=1, vocabulary=400, max_length=128
    ),
    "qwen2_5_vl": Qwen2_5VLProcessor(
        Chat(QWEN_TOKENIZER, image="<|image_pad|>", start="<|vision_start|>", end="<|vision_end|>"),
        Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024),
        merge=2,
        vocabulary=400,
        max_length=128,
    ),
    "ovis": OvisProcessor(
        OvisChat(TOKENIZER, ""),
        Pixels(patch=4, merge=2, min_pixels=64, max_pixels=1024),
        vocabulary=400,
        max_length=128,
    ),
}
kinds = pytest.mark.parametrize("kind", PROCESSORS)


def picture(height: int, width: int, seed: int) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def said(user: str, assistant: str) -> list[Message]:
    return [Message(role="user", text=user), Message(role="assistant", text=assistant)]


ROWS = [
    said("how many red circles are there?", "two"),
    said("<image> a red circle", "red"),
    said("<image><image>", "a"),
]
IMAGES = [[], [picture(32, 32, 1)], [picture(16, 24, 2), picture(40, 24, 3)]]


@kinds
def test_padding_single_conversations_is_tokenizing_them_together(kind: str) -> None:
    processor = PROCESSORS[kind]
    together = processor.tokenize(ROWS, images=IMAGES)
    each = [processor.tokenize([row], images=[images]) for row, images in zip(ROWS, IMAGES, strict=True)]
    assert vars(processor.pad(each)).keys() == vars(together).keys()
    for name, value in vars(together).items():
        got = getattr(processor.pad(each), name)
        assert (got is None) == (value is None)
        assert value is None or torch.equal(got, value), name


@kinds
def test_pixels_of_single_images_join_to_those_of_all(kind: str) -> None:
    processor, images = PROCESSORS[kind], [image for row in IMAGES for image in row]
    together, joined = processor.pixels(images), join_inputs([processor.pixels([image]) for image in images])
    assert joined.grids == together.grids
    assert torch.equal(joined.values, together.values)
    assert sum(together.counts) == len(together.values)


@kinds
@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_a_white_picture_stays_white(kind: str, size: tuple[int, int]) -> None:
    """Image processors of transformers divide floats by 255 again (docs/surprises.md)."""
    if kind == "internvl" and size != (32, 32):
        pytest.skip("this one has no image processor")
    white, black = (PROCESSORS[kind].pixels([torch.full((3, *size), level)]).values for level in (1.0, -1.0))
    assert (white - black).min() > 1.9  # one over the deviation by which they normalise


@kinds
def test_a_pickled_processor_reads_the_same(kind: str) -> None:
    processor: Any = PROCESSORS[kind]
    again = pickle.loads(pickle.dumps(processor))
    assert torch.equal(again.tokenize(ROWS, images=IMAGES).ids, processor.tokenize(ROWS, images=IMAGES).ids)
    assert torch.equal(again.pixels(IMAGES[1]).values, processor.pixels(IMAGES[1]).values)


@kinds
def test_words_of_an_answer_are_learned_and_its_images_are_not(kind: str) -> None:
    """Also where the images stand first, last and side by side."""
    processor: Any = PROCESSORS[kind]
    for text in ("a red <image> circle", "<image>a red circle<image>", "<image><image> a red circle"):
        images = [picture(32, 32, number) for number in range(text.count("<image>"))]
        made = processor.tokenize([said("how many", text)], images=[images])
        chosen = made.ids[0][made.loss_mask[0]].tolist()
        assert min(chosen) >= 0
        shown = processor.tokenizer.decode(chosen)
        assert shown.split() == ["a", "red", "circle<|im_end|>"]
        assert not (made.loss_mask & made.images).any()
        assert made.images.sum() > 0


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_positions_are_those_of_transformers(data: st.DataObject) -> None:
    model = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)
    model.config = Qwen2_5_VLConfig()
    grids = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3))
    slots: list[bool] = [False] * data.draw(st.integers(0, 3))
    for rows, columns in grids:
        slots += [True] * (rows * columns) + [False] * data.draw(st.integers(1, 3))
    padding = data.draw(st.integers(0, 3))
    mask = torch.tensor([[True] * len(slots) + [False] * padding])
    images = torch.tensor([slots + [False] * padding])
    merge = model.config.vision_config.spatial_merge_size
    expected, _ = model.get_rope_index(
        torch.zeros_like(mask, dtype=torch.long),
        mm_token_type_ids=images.int(),
        image_grid_thw=torch.tensor([[1, rows * merge, columns * merge] for rows, columns in grids]),
        attention_mask=mask.long(),
    )
    assert torch.equal(positions(mask[0], images[0], grids), expected[:, 0].T)
