"""Conversations as Ovis reads them: ChatML whose images are negative ids, which no tokenizer has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from diptych.core.errors import UserError
from diptych.core.sample import IMAGE_PLACEHOLDER, Message
from diptych.parts.backbones.processor import Sequences
from diptych.parts.backbones.visual_tokenizer import IMAGE, expand, placeholders

START, END = "<|im_start|>", "<|im_end|>"
NO_THOUGHTS = "<think>\n\n</think>\n\n"
"""What Qwen3's assistant turns begin with where it is not to think aloud."""


@dataclass(frozen=True)
class Piece:
    """A stretch of text, or None for an image; `learned` where it is the words of an assistant's turn."""

    text: str | None
    learned: bool = False


class OvisChat:
    """A tokenizer with ChatML's turns.

    Text between images is tokenized stretch by stretch, as is each assistant's turn, which begins after `preface`: so
    a learned turn has the very tokens that generation can give.

    Args:
        tokenizer: of the language model. preface: what every assistant's turn begins with.

    Raises:
        UserError: the tokenizer lacks the tokens around a turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, preface: str = NO_THOUGHTS) -> None:
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in (START, END) if token not in vocabulary]
        if missing:
            raise UserError(f"tokenizer {tokenizer.name_or_path!r}: lacks the special tokens {', '.join(missing)}")
        self.tokenizer = tokenizer
        self.preface = preface
        closing = vocabulary[END]
        self.end_ids = frozenset({closing, vocabulary.get(str(tokenizer.eos_token), closing)})
        self.pad_id: int = vocabulary.get(str(tokenizer.pad_token), closing)

    def encode(
        self,
        conversations: Sequence[Sequence[Message]],
        counts: Sequence[Sequence[int]],
        *,
        generate: bool,
        max_length: int,
        opening: str = "",
    ) -> Sequences:
        """Right-padded ids on the CPU; image slots hold -300, indicators -301 to -303.

        Without `generate` a conversation that ends with the user's turn stays closed: so a condition is read.

        Args:
            counts: for each conversation the visual tokens of each of its images, in reading order.
            generate: open an assistant's turn, which begins with the preface and `opening`.

        Raises:
            UserError: placeholders and images differ in number, a text holds a reserved token, or a conversation is
                longer than `max_length`.
        """
        if len(counts) != len(conversations):
            raise UserError(f"{len(conversations)} conversations with images for {len(counts)}")
        pieces = [self._pieces(row, messages, generate, opening) for row, messages in enumerate(conversations)]
        texts = [piece.text for row in pieces for piece in row if piece.text is not None]
        encoded: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []  # type: ignore[assignment]
        waiting = iter(encoded)
        rows: list[list[int]] = []
        learned: list[list[bool]] = []
        for number, (row, images) in enumerate(zip(pieces, counts, strict=True)):
            placed = sum(piece.text is None for piece in row)
            if placed != len(images):
                raise UserError(
                    f"conversation {number}: {placed} {IMAGE_PLACEHOLDER} placeholders but {len(images)} images"
                )
            ids: list[int] = []
            targets: list[bool] = []
            for piece in row:
                part = placeholders(1) if piece.text is None else next(waiting)
                ids += part
                targets += [piece.learned] * len(part)
            grown = expand(ids, images)
            sizes = expand_flags(ids, targets, images)
            self._check_length(number, grown, max_length)
            rows.append(grown)
            learned.append(sizes)
        return padded(rows, learned, self.pad_id)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def render(self, messages: Sequence[Message], *, generate: bool, opening: str = "") -> str:
        """A conversation as one text, `<image>` where an image stands."""
        pieces = self._pieces(0, messages, generate, opening)
        return "".join(IMAGE_PLACEHOLDER if piece.text is None else piece.text for piece in pieces)

    def _pieces(self, row: int, messages: Sequence[Message], generate: bool, opening: str) -> list[Piece]:
        assert generate or not opening, "an opening needs an open turn"
        pieces: list[Piece] = []
        text = ""

        def close(learned: bool = False) -> None:
            nonlocal text
            if text:
                pieces.append(Piece(text, learned))
            text = ""

        for message in messages:
            for token in (START, END):
                if token in message.text:
                    raise UserError(
                        f"conversation {row}: a {message.role} text holds the reserved token {token}; "
                        "write one message for each turn"
                    )
            text += f"{START}{message.role}\n"
            if message.role == "assistant":
                text += self.preface
                close()
            stretches = message.text.split(IMAGE_PLACEHOLDER)
            for number, stretch in enumerate(stretches):
                text += stretch
                if number + 1 < len(stretches):
                    close(learned=message.role == "assistant")
                    pieces.append(Piece(None))
            text += END
            if message.role == "assistant":
                close(learned=True)
            text += "\n"
        if generate:
            text += f"{START}assistant\n{self.preface}{opening}"
        close()
        return pieces

    def _check_length(self, row: int, ids: list[int], max_length: int) -> None:
        if len(ids) <= max_length:
            return
        lost = self.decode([id for id in ids[max_length:] if id >= 0]).strip()
        shown = lost if len(lost) <= 80 else f"{lost[:40]} ... {lost[-35:]}"
        raise UserError(
            f"conversation {row}: {len(ids)} tokens, but the model takes {max_length}; "
            f"the last {len(ids) - max_length} would be cut: {shown!r}. Shorten the text or use fewer images."
        )


def expand_flags(ids: Sequence[int], flags: Sequence[bool], counts: Sequence[int]) -> list[bool]:
    """The flags of `visual_tokenizer.expand`'s row: those of an image's atom for each of its tokens."""
    waiting = iter(counts)
    pairs = zip(ids, flags, strict=True)
    return [flag for id, flag in pairs for _ in range(next(waiting) if id == IMAGE else 1)]


def padded(rows: Sequence[Sequence[int]], learned: Sequence[Sequence[bool]], pad_id: int) -> Sequences:
    """Rows of ids as one right-padded batch."""
    length = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    targets = torch.zeros((len(rows), length), dtype=torch.bool)
    for index, (row, target) in enumerate(zip(rows, learned, strict=True)):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, : len(row)] = True
        targets[index, : len(row)] = torch.tensor(target, dtype=torch.bool)
    return Sequences(ids=ids, mask=mask, images=(ids == IMAGE) & mask, loss_mask=targets)
