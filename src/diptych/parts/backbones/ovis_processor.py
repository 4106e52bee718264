"""Texts and images as Ovis reads them: negative ids for images, patches at native resolution (Ovis-U1, Sec. 2)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from diptych.core.errors import UserError
from diptych.core.sample import Message
from diptych.parts.backbones.native_resolution import Pixels, pack_images
from diptych.parts.backbones.ovis_chat import OvisChat
from diptych.parts.backbones.processor import Processor, Sequences, VisionInputs
from diptych.parts.backbones.published import check_rows


class OvisProcessor(Processor):
    """Args:
    chat: None where no text is read. sizes: how images become patches. vocabulary: rows of the embedding table.
    """

    def __init__(self, chat: OvisChat | None, sizes: Pixels, *, vocabulary: int, max_length: int) -> None:
        self._chat = chat
        self.sizes = sizes
        self.vocabulary, self.max_length, self.image_step = vocabulary, max_length, sizes.factor

    @property
    def chat(self) -> OvisChat:
        if self._chat is None:
            raise UserError("this Ovis was built without a tokenizer")
        return self._chat

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.chat.tokenizer

    @property
    def pad_id(self) -> int:
        return self.chat.pad_id

    def tokenize(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        images: Sequence[Sequence[Tensor]] = (),
        generate: bool = False,
        opening: str = "",
        whole: bool = True,
    ) -> Sequences:
        counts = [[self.slots(image) for image in row] for row in images] if images else [[] for _ in conversations]
        longest = self.max_length if whole else sys.maxsize
        encoded = self.chat.encode(conversations, counts, generate=generate, max_length=longest, opening=opening)
        check_rows(encoded.ids, self.tokenizer, self.vocabulary)
        return encoded

    def pixels(self, images: Sequence[Tensor]) -> VisionInputs:
        patches, grids = pack_images(images, self.sizes)
        return VisionInputs(values=patches, grids=tuple(grids))

    def vision_grid(self, image: Tensor) -> tuple[int, int]:
        height, width = self.sizes.size(*image.shape[-2:])
        return height // self.sizes.factor, width // self.sizes.factor

    def slots(self, image: Tensor) -> int:
        """Visual tokens of an image (3, H, W); UserError for one that cannot be read at any size."""
        rows, columns = self.vision_grid(image)
        return rows * columns
