"""Conversations to token ids: chat template, image slots, and which tokens are learned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from diptych.core.errors import UserError, attributed_to
from diptych.core.sample import IMAGE_PLACEHOLDER, Message
from diptych.parts.backbones.processor import Sequences, joined

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The template of InternVL3 (and of the Qwen family) for text content; used where tokenizer files bring none."""


MEMORY = 512
"""Conversations whose tokens a `Chat` keeps."""

Row = tuple[list[int], list[bool]]
"""The ids of a conversation, and which of them are learned."""


@dataclass(frozen=True)
class Segment:
    text: str
    learned: bool


class Chat:
    """A tokenizer and its chat template.

    Text is tokenized in segments that part before each assistant turn's content, so that a learned turn has the very
    tokens that generation, which also starts there, can give.

    Args:
        tokenizer: any tokenizer of transformers; without a chat template, ChatML is used.
        image: the token of one image slot. start, end: tokens around an image's slots.
        end_of_turn: the token that closes a turn.

    Raises:
        UserError: the tokenizer lacks one of these tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        image: str = "<IMG_CONTEXT>",
        start: str = "<img>",
        end: str = "</img>",
        end_of_turn: str = "<|im_end|>",
    ) -> None:
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in (image, start, end, end_of_turn) if token not in vocabulary]
        if missing:
            raise UserError(f"tokenizer {tokenizer.name_or_path!r}: lacks the special tokens {', '.join(missing)}")
        self.tokenizer = tokenizer
        self.image, self.start, self.end, self.end_of_turn = image, start, end, end_of_turn
        self._image = re.compile(f"({re.escape(start)}(?:{re.escape(image)})*{re.escape(end)})")
        self.image_id: int = vocabulary[image]
        closing = vocabulary[end_of_turn]
        self.end_ids = frozenset(
            {
                closing,
                vocabulary.get(str(tokenizer.eos_token), closing),
                vocabulary.get(str(tokenizer.pad_token), closing),
            }
        )
        self.pad_id: int = vocabulary.get(str(tokenizer.pad_token), closing)
        self._rows: dict[Any, Row] = {}

    def encode(
        self,
        conversations: Sequence[Sequence[Message]],
        slots: Sequence[Sequence[int]],
        *,
        generate: bool,
        max_length: int,
        opening: str = "",
    ) -> Sequences:
        """Right-padded ids on the CPU; see `Backbone.tokenize`.

        Args:
            slots: for each conversation the number of vision tokens of each of its images, in reading order.
            opening: what the assistant's turn that `generate` opens begins with.

        Raises:
            UserError: placeholders and images differ in number, a text holds an image or end-of-turn token, or a
                conversation is longer than `max_length`.
        """
        if len(slots) != len(conversations):
            raise UserError(f"{len(conversations)} conversations with images for {len(slots)}")
        # Requests are often alike (a batch of unlabelled images has one text): each is written out once, and what
        # those of the call before became is kept. Texts that are new are tokenized together.
        template = self.tokenizer.chat_template
        keys = [(tuple(m), tuple(c), generate, opening, template) for m, c in zip(conversations, slots, strict=True)]
        rows = {key: self._rows[key] for key in keys if key in self._rows}
        new: dict[Any, list[Segment]] = {}
        for row, key in enumerate(keys):
            if key not in rows and key not in new:
                new[key] = self._segments(row, self._filled(row, key[0], key[1]), generate, opening)
        texts = list(dict.fromkeys(segment.text for segments in new.values() for segment in segments))
        encoded: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []  # type: ignore[assignment]
        ids_of = dict(zip(texts, encoded, strict=True))
        for key, segments in new.items():
            ids = [id for segment in segments for id in ids_of[segment.text]]
            rows[key] = ids, [segment.learned for segment in segments for _ in ids_of[segment.text]]
        for row, key in enumerate(keys):
            self._check_length(row, rows[key][0], max_length)
        self._rows = rows if len(self._rows) + len(new) > MEMORY else {**self._rows, **rows}
        return self._padded([rows[key] for key in keys])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _filled(self, row: int, messages: Sequence[Message], counts: Sequence[int]) -> list[dict[str, Any]]:
        """Messages with each `<image>` written out as its slots."""
        placeholders = sum(message.text.count(IMAGE_PLACEHOLDER) for message in messages)
        if placeholders != len(counts):
            raise UserError(
                f"conversation {row}: {placeholders} {IMAGE_PLACEHOLDER} placeholders but {len(counts)} images"
            )
        waiting = iter(counts)
        filled: list[dict[str, Any]] = []
        for message in messages:
            for token in (self.image, self.end_of_turn):
                if token in message.text:
                    raise UserError(
                        f"conversation {row}: a {message.role} text holds the reserved token {token}; "
                        f"write {IMAGE_PLACEHOLDER} where an image is meant and one message for each turn"
                    )
            first, *rest = message.text.split(IMAGE_PLACEHOLDER)
            text = first + "".join(self.start + self.image * next(waiting) + self.end + part for part in rest)
            filled.append({"role": message.role, "content": text})
        return filled

    def _render(self, messages: list[dict[str, Any]], *, opened: bool) -> str:
        template = None if self.tokenizer.chat_template else CHATML
        with attributed_to("the model's chat template cannot be used"):
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=opened, chat_template=template
                )
            )

    def _segments(self, row: int, messages: list[dict[str, Any]], generate: bool, opening: str) -> list[Segment]:
        assert generate or not opening, "an opening needs an open turn"
        segments: list[Segment] = []
        whole = self._render(messages, opened=generate) + opening
        for message in messages:
            if message["role"] == "user" and str(message["content"]).strip() not in whole:
                raise UserError("the model's chat template leaves out what the user says")
        at = 0
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:turn], opened=True)
            if not whole.startswith(before):
                raise UserError(
                    f"conversation {row}: the tokenizer's chat template rewrites earlier turns, so that learned tokens "
                    "cannot be told; give one that renders turn after turn"
                )
            closing = whole.find(self.end_of_turn, len(before))
            stop = len(whole) if closing < 0 else closing + len(self.end_of_turn)
            segments.append(Segment(whole[at : len(before)], False))
            segments += self._turn(whole[len(before) : stop])
            at = stop
        segments.append(Segment(whole[at:], False))
        return [segment for segment in segments if segment.text]

    def _turn(self, text: str) -> list[Segment]:
        """An assistant's turn: its words are learned, its images and the markers around them are not."""
        pieces = self._image.split(text)  # words, image, words, ...
        return [Segment(piece, number % 2 == 0) for number, piece in enumerate(pieces)]

    def _check_length(self, row: int, ids: list[int], max_length: int) -> None:
        if len(ids) <= max_length:
            return
        lost = self.decode(ids[max_length:]).strip()
        shown = lost if len(lost) <= 80 else f"{lost[:40]} ... {lost[-35:]}"
        raise UserError(
            f"conversation {row}: {len(ids)} tokens, but the model takes {max_length}; "
            f"the last {len(ids) - max_length} would be cut: {shown!r}. Shorten the text or use fewer images."
        )

    def _padded(self, rows: Sequence[Row]) -> Sequences:
        ids = joined([torch.tensor([ids], dtype=torch.long) for ids, _ in rows], self.pad_id)
        learned = joined([torch.tensor([flags], dtype=torch.bool) for _, flags in rows])
        mask = joined([torch.ones((1, len(ids)), dtype=torch.bool) for ids, _ in rows])
        return Sequences(ids=ids, mask=mask, images=(ids == self.image_id) & mask, loss_mask=learned)
