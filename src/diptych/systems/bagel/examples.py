"""From samples and conversations to items with their content.

All but the autoencoder's work is done on the CPU, sample by sample: texts become ids, images are resized and become the
vision tower's patches. Images that are read or learned as latents are kept as pixels, and encoded for a whole batch at
once (`encode_by_shape`).

P side of a vision patch, c numbers in a latent token, n tokens of an image, C, h, w sizes of a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.image_sizes import SideRange
from diptych.core.patchify import patchify
from diptych.core.sample import IMAGE_PLACEHOLDER, Message, Sample
from diptych.objectives.flow_matching import mask_weights
from diptych.systems.bagel.config import BagelConfig, Wording
from diptych.systems.bagel.context import Piece, latent_piece, text_piece, vision_piece
from diptych.systems.bagel.items import Item, Latent, Markers, Text, Vision
from diptych.systems.bagel.network import NetworkConfig

Part = str | Tensor
"""A text, or an image (3, H, W) in [-1, 1]."""

ENCODED_PIXELS = 4 * 1024 * 1024
"""Pixels that the autoencoder is given at once, at most (and one image at least)."""


@dataclass
class Example:
    """A training sample. patches: (n, 3 P^2) of each vision item. images: of each latent item that is in the row, the
    image (3, H, W) to encode, or where it is known its latent (C, h, w). `is_latent` says which. weights: of the
    target's tokens, (n, c), where there is a loss mask.
    """

    items: list[Item] = field(default_factory=list[Item])
    patches: list[Tensor] = field(default_factory=list[Tensor])
    images: list[Tensor] = field(default_factory=list[Tensor])
    is_latent: list[bool] = field(default_factory=list[bool])
    weights: Tensor | None = None

    @property
    def cost(self) -> int:
        """Tokens in a row."""
        return sum(item.cost for item in self.items)


def encode_by_shape(images: Sequence[Tensor], encode: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Images (3, H, W) of any sizes to latents (C, h, w), those of one size together.

    Args:
        encode: images (B, 3, H, W) to latents (B, C, h, w).
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, image in enumerate(images):
        rows.setdefault(tuple(image.shape), []).append(row)
    latents: dict[int, Tensor] = {}
    for shape, group in rows.items():
        count = max(1, ENCODED_PIXELS // (shape[1] * shape[2]))
        for start in range(0, len(group), count):
            some = group[start : start + count]
            latents |= dict(zip(some, encode(torch.stack([images[row] for row in some])), strict=True))
    return [latents[row] for row in range(len(images))]


def images_in(parts: Sequence[Part]) -> int:
    """How many images a request or conversation has."""
    return sum(not isinstance(part, str) for part in parts)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image (3, H, W) in [-1, 1] at `size` (H, W): levels of 8 bits and Pillow's bicubic, as the release does it;
    the image itself where it has the size already."""
    if size == tuple(image.shape[1:]):
        return image
    levels = image.detach().float().clamp(-1, 1).add(1.0).mul(127.5).round().byte()
    picture = Image.fromarray(levels.permute(1, 2, 0).cpu().contiguous().numpy())
    resized = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    data = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(size[0], size[1], 3)
    return data.permute(2, 0, 1).float().div(127.5).sub(1.0).to(image.device)


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
        image_step: sides of images that become latents are multiples of it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        markers: Markers,
        network: NetworkConfig,
        image_step: int,
    ) -> None:
        self.tokenizer, self.markers, self.network = tokenizer, markers, network
        self.image_step = image_step

    # Requests

    def pieces(
        self,
        requests: Sequence[Sequence[Part]],
        config: BagelConfig,
        *,
        draw: bool,
        where: Sequence[str],
        encode: Callable[[Tensor], Tensor],
    ) -> list[list[Piece]]:
        """Requests, each of parts in reading order, as pieces.

        Where an image is to be drawn, an image is resized to the autoencoder's size first and read as latents and by
        the vision tower at what that size becomes, as the released inferencer does it: 300x200 becomes 768x512, and
        2,035 vision tokens. A question's image goes to the tower from its own size, as in the released scoring.

        Args:
            where: names of the requests, for errors. encode: as of `encode_by_shape`.
        """
        # 1. Texts and vision patches; images that become latents are kept for the next step.
        planned: list[list[Piece | Tensor]] = []
        for parts, name in zip(requests, where, strict=True):
            images = images_in(parts)
            plan: list[Piece | Tensor] = []
            for part in parts:
                if isinstance(part, str):
                    plan.append(text_piece(self.ids(part, name)))
                    continue
                if draw:
                    part = self.fit(part, config.latent_size, self.image_step)
                    plan.append(part)
                plan.append(vision_piece(*self.vision(part, config.vision_size, images)))
            planned.append(plan)
        # 2. All latents, in batches by shape.
        pixels = [piece for plan in planned for piece in plan if isinstance(piece, Tensor)]
        latents = iter(encode_by_shape(pixels, encode))
        requests_read = [
            [latent_piece(*self.tokens(next(latents))) if isinstance(piece, Tensor) else piece for piece in plan]
            for plan in planned
        ]
        for pieces, parts, name in zip(requests_read, requests, where, strict=True):
            self.check(sum(piece.item.cost for piece in pieces), config, name, images_in(parts))
        return requests_read

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
            return self._conversation(sample, config)
        example = Example()
        parts = self.request(sample)
        count = images_in(parts)
        chances = iter(draws.uniform("drop", 2 * len(parts))[0].tolist())
        # The request: texts, and images as latents of the autoencoder and as tokens of the vision tower. Each may drop.
        for part in parts:
            first, second = next(chances), next(chances)
            if isinstance(part, str):
                example.items.append(Text(ids=self.ids(part, sample.id), drop=first < config.cfg_dropout_text))
                continue
            if config.reference_latents:
                image = self.fit(part, config.latent_size, self.image_step)
                self._add_latent(example, image, drop=first < config.cfg_dropout_vae)
            self._add_vision(example, part, vision_size(config, True), count, second < config.cfg_dropout_vit)
        # The image to be drawn, noised.
        target = sample.image if sample.latent is None else sample.latent
        if target is None:
            raise UserError(f"{sample.id}: task {sample.task!r} needs a target image")
        self._add_latent(example, target, noised=True, encoded=sample.latent is not None)
        if sample.loss_mask is not None:
            item, patch = example.items[-1], self.network.latent_patch
            assert isinstance(item, Latent), "the target was added last"
            weights = mask_weights(sample.loss_mask, (item.rows * patch, item.columns * patch))
            example.weights = self.tokens(weights.expand(self.network.latent_channels, -1, -1))[0]
        self.check(example.cost, config, sample.id, count)
        return example

    def _conversation(self, sample: Sample, config: BagelConfig) -> Example:
        """A conversation: every assistant turn is learned, its images are read by the vision tower."""
        example = Example()
        images = iter(sample.context_images)
        self.conversation(sample.messages, sample.context_images, sample.id)  # checks placeholders
        count = len(sample.context_images)
        for message in sample.messages:
            for part in split(message.text):
                if part is None:
                    self._add_vision(example, next(images), vision_size(config, False), count, False)
                else:
                    learned = message.role == "assistant"
                    example.items.append(Text(ids=self.ids(part, sample.id), learned=learned))
        self.check(example.cost, config, sample.id, count)
        return example

    def _add_vision(self, example: Example, image: Tensor, size: SideRange, count: int, drop: bool) -> None:
        patches, rows, columns = self.vision(image, size, count)
        example.items.append(Vision(rows=rows, columns=columns, drop=drop))
        if not drop:
            example.patches.append(patches)

    def _add_latent(
        self, example: Example, image: Tensor, *, noised: bool = False, drop: bool = False, encoded: bool = False
    ) -> None:
        """An image as latent tokens; `encoded`: it is a latent already."""
        side = self.network.latent_patch if encoded else self.image_step
        rows, columns = image.shape[1] // side, image.shape[2] // side
        example.items.append(Latent(rows=rows, columns=columns, noised=noised, drop=drop))
        if not drop:
            example.images.append(image)
            example.is_latent.append(encoded)

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

    def fit(self, image: Tensor, size: SideRange, stride: int, images: int = 1) -> Tensor:
        """An image (3, H, W) at the size that a rule gives it."""
        return resize(image, size.fit(image.shape[1], image.shape[2], stride, images))

    def vision(self, image: Tensor, size: SideRange, images: int) -> tuple[Tensor, int, int]:
        """Patches (n, 3 P^2) of an image, and its rows and columns. images: in the sample."""
        patch = self.network.vision.patch_size
        fitted = self.fit(image, size, patch, images)
        return patchify(fitted[None], patch, "pqc")[0], fitted.shape[1] // patch, fitted.shape[2] // patch

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


def vision_size(config: BagelConfig, draw: bool) -> SideRange:
    """The size at which the vision tower reads an image: of one to draw from, or of a conversation."""
    return config.vision_size_edit if draw and config.vision_size_edit is not None else config.vision_size


def split(text: str) -> list[str | None]:
    """A text parted at its image placeholders, each of which becomes None; empty pieces are left out."""
    parts: list[str | None] = []
    for number, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if number:
            parts.append(None)
        if piece.strip():
            parts.append(piece.strip())
    return parts


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
