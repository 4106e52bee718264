"""From samples and conversations to items with their content.

P side of a vision patch, c numbers in a latent token, n tokens of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.patchify import patchify
from diptych.core.sample import IMAGE_PLACEHOLDER, Message, Sample
from diptych.systems.bagel.config import BagelConfig, Wording
from diptych.systems.bagel.context import Piece, latent_piece, text_piece, vision_piece
from diptych.systems.bagel.items import Item, Latent, Markers, Text, Vision
from diptych.systems.bagel.network import NetworkConfig

Part = str | Tensor
"""A text, or an image (3, H, W) in [-1, 1]."""


@dataclass
class Example:
    """A training sample. patches: (n, 3 P^2) of each vision item. latents: clean (n, c) of each latent item."""

    items: list[Item] = field(default_factory=list[Item])
    patches: list[Tensor] = field(default_factory=list[Tensor])
    latents: list[Tensor] = field(default_factory=list[Tensor])

    @property
    def cost(self) -> int:
        """Tokens in a row."""
        return sum(item.cost for item in self.items)


def find_markers(tokenizer: PreTrainedTokenizerBase, wording: Wording) -> Markers:
    """Ids of the special tokens. UserError names those that the tokenizer lacks."""
    vocabulary = tokenizer.get_vocab()
    wanted = (wording.bos, wording.eos, wording.start_image, wording.end_image)
    missing = [token for token in wanted if token not in vocabulary]
    if missing:
        raise UserError(f"tokenizer {tokenizer.name_or_path!r}: lacks the special tokens {', '.join(missing)}")
    bos, eos, start, end = (vocabulary[token] for token in wanted)
    return Markers(bos=bos, eos=eos, start_image=start, end_image=end)


class Reader:
    """Texts and images as tokens.

    Args:
        encode: images (1, 3, H, W) to latents. image_step: sides of images that become latents are multiples of it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        markers: Markers,
        network: NetworkConfig,
        encode: Callable[[Tensor], Tensor],
        image_step: int,
    ) -> None:
        self.tokenizer, self.markers, self.network = tokenizer, markers, network
        self.encode, self.image_step = encode, image_step

    # Requests

    def pieces(self, parts: Sequence[Part], config: BagelConfig, *, draw: bool, where: str) -> list[Piece]:
        """Parts in reading order as pieces; an image is read as latents too where an image is to be drawn."""
        images = sum(not isinstance(part, str) for part in parts)
        found: list[Piece] = []
        for part in parts:
            if isinstance(part, str):
                found.append(text_piece(self.ids(part, where)))
                continue
            if draw:
                found.append(latent_piece(*self.latent(config.latent_size.resize(part, self.image_step))))
            found.append(vision_piece(*self.vision(part, config, images)))
        self.check(sum(piece.item.cost for piece in found), config, where, images)
        return found

    def request(self, sample: Sample) -> list[Part]:
        """What a sample that asks for an image says: system turns, images and text, and the thought that followed.

        Images stand before the text, or where it has placeholders.
        """
        before = [message.text for message in sample.messages if message.role == "system"]
        after = [message.text for message in sample.messages if message.role == "assistant"]
        middle = fill(sample.text, sample.context_images, sample.id, first=True)
        return [*before, *middle, *after]

    def conversation(self, messages: Sequence[Message], images: Sequence[Tensor], where: str) -> list[Part]:
        """All turns in order, with images at their placeholders."""
        marked = [part for message in messages for part in split(message.text)]
        return fill_marks(marked, images, where)

    # Training

    def example(self, sample: Sample, config: BagelConfig, draws: Draws) -> Example:
        """A training sample with its drops drawn."""
        if sample.task == "understand":
            return self._told(sample, config)
        example = Example()
        parts = self.request(sample)
        count = sum(not isinstance(part, str) for part in parts)
        chances = iter(draws.uniform("drop", 2 * len(parts))[0].tolist())
        for part in parts:
            first, second = next(chances), next(chances)
            if isinstance(part, str):
                example.items.append(Text(ids=self.ids(part, sample.id), drop=first < config.cfg_dropout_text))
            else:
                self._add_latent(
                    example, config.latent_size.resize(part, self.image_step), first < config.cfg_dropout_vae
                )
                self._add_vision(example, part, config, count, second < config.cfg_dropout_vit)
        if sample.latent is not None:
            tokens, rows, columns = self.tokens(sample.latent)
        elif sample.image is not None:
            tokens, rows, columns = self.latent(sample.image)
        else:
            raise UserError(f"{sample.id}: task {sample.task!r} needs a target image")
        example.items.append(Latent(rows=rows, columns=columns, noised=True))
        example.latents.append(tokens)
        self.check(example.cost, config, sample.id, count)
        return example

    def _told(self, sample: Sample, config: BagelConfig) -> Example:
        example = Example()
        images = iter(sample.context_images)
        self.conversation(sample.messages, sample.context_images, sample.id)  # checks placeholders
        for message in sample.messages:
            for part in split(message.text):
                if part is None:
                    self._add_vision(example, next(images), config, len(sample.context_images), False)
                else:
                    learned = message.role == "assistant"
                    example.items.append(Text(ids=self.ids(part, sample.id), learned=learned))
        self.check(example.cost, config, sample.id, len(sample.context_images))
        return example

    def _add_vision(self, example: Example, image: Tensor, config: BagelConfig, count: int, drop: bool) -> None:
        patches, rows, columns = self.vision(image, config, count)
        example.items.append(Vision(rows=rows, columns=columns, drop=drop))
        if not drop:
            example.patches.append(patches)

    def _add_latent(self, example: Example, image: Tensor, drop: bool) -> None:
        step = self.image_step
        if drop:
            example.items.append(Latent(rows=image.shape[1] // step, columns=image.shape[2] // step, drop=True))
            return
        tokens, rows, columns = self.latent(image)
        example.items.append(Latent(rows=rows, columns=columns))
        example.latents.append(tokens)

    # Tokens

    def ids(self, text: str, where: str) -> tuple[int, ...]:
        """A text's tokens. UserError on one that marks texts or images."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore
        markers = self.markers
        reserved = {markers.bos, markers.eos, markers.start_image, markers.end_image}.intersection(ids)
        if reserved:
            token = self.tokenizer.convert_ids_to_tokens(min(reserved))
            raise UserError(f"{where}: the text holds the reserved token {token}")
        return tuple(ids)

    def vision(self, image: Tensor, config: BagelConfig, images: int) -> tuple[Tensor, int, int]:
        """Patches (n, 3 P^2) of an image, and its rows and columns."""
        patch = self.network.vision.patch_size
        resized = config.vision_size.resize(image, patch, images)
        return patchify(resized[None], patch, "pqc")[0], resized.shape[1] // patch, resized.shape[2] // patch

    def latent(self, image: Tensor) -> tuple[Tensor, int, int]:
        """Latent tokens (n, c) of an image, and its rows and columns."""
        return self.tokens(self.encode(image[None])[0])

    def tokens(self, latent: Tensor) -> tuple[Tensor, int, int]:
        """A latent (C, h, w) as tokens (n, c), and its rows and columns."""
        patch = self.network.latent_patch
        rows, columns = latent.shape[1] // patch, latent.shape[2] // patch
        return patchify(latent[None], patch, "pqc")[0], rows, columns

    def check(self, cost: int, config: BagelConfig, where: str, images: int) -> None:
        """UserError when a sample is longer than `sample_tokens`."""
        if cost > config.sample_tokens:
            shown = f" ({images} images among them)" if images else ""
            raise UserError(
                f"{where}: {cost} tokens{shown}, more than sample_tokens {config.sample_tokens}; nothing is cut: "
                "use fewer or smaller images, a shorter text, or raise sample_tokens"
            )


def split(text: str) -> list[str | None]:
    """A text parted at its image placeholders, each of which becomes None; empty pieces are left out."""
    found: list[str | None] = []
    for number, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if number:
            found.append(None)
        if piece.strip():
            found.append(piece.strip())
    return found


def fill(text: str, images: Sequence[Tensor], where: str, *, first: bool) -> list[Part]:
    """A text with images at its placeholders; where it has none, the images stand first."""
    marked = split(text)
    if first and None not in marked:
        return [*images, *(part for part in marked if part is not None)]
    return fill_marks(marked, images, where)


def fill_marks(marked: Sequence[str | None], images: Sequence[Tensor], where: str) -> list[Part]:
    """Images put in the places of None. UserError when their numbers differ."""
    places = sum(part is None for part in marked)
    if places != len(images):
        raise UserError(f"{where}: {places} {IMAGE_PLACEHOLDER} placeholders but {len(images)} images")
    waiting = iter(images)
    return [next(waiting) if part is None else part for part in marked]
