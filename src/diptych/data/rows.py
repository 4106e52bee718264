"""A row, whatever file it came from, to a Sample: which keys each task reads, and their checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash
from PIL import Image

from diptych.core.errors import UserError
from diptych.core.sample import IMAGE_PLACEHOLDER, Message, Sample, Task
from diptych.data.captions import kind, text_list
from diptych.data.colour import PROFILE
from diptych.data.imaging import FitMode, fit
from diptych.data.reading import Reading
from diptych.data.source import BadItem, ItemDraws, Size

KEYS: Mapping[Task, tuple[str, ...]] = {
    "image": ("image",),
    "text_to_image": ("image", "text"),
    "edit": ("image", "instruction", "source", "sources"),
    "understand": ("conversations", "messages", "image", "images"),
}
"""Keys that each task reads; of `source`/`sources`, `conversations`/`messages` and `image`/`images` a row has one."""

MASK = "mask"
"""Key of an image's loss mask, for tasks that make one, where the source reads masks (`Reading.masks`)."""

ROLES: Mapping[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}

PROFILES = "colour profiles"
"""Key of a sample's `extra`: names of the colour profiles that its images were converted from, if any."""

DIGEST = "digest of images"
"""Key of a sample's `extra`: xxHash (64 bits) of its image files, that of the target first (`Reading.digests`)."""

TEXTS = "all texts"
"""Key of a sample's `extra`: every text of its item, of which a visit draws one (`Reading.digests`)."""

FindImage = Callable[[Any], bytes | Path]
"""An image's reference, as it stands in the row, to its file or the file's bytes; BadItem where there is none."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A checked row.

    target: reference of the image to make. mask: of its loss mask. context: references of the images to read.
    texts: captions or instructions, of which a visit draws one. weights: of each; all are as likely where there are
    none.
    """

    target: Any = None
    mask: Any = None
    context: tuple[Any, ...] = ()
    texts: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    messages: tuple[Message, ...] = ()

    def text(self, draws: ItemDraws) -> str:
        """The text of a visit; "" where there is none."""
        if len(set(self.weights)) < 2:
            return self.texts[draws.integer("text", len(self.texts))] if self.texts else ""
        point = draws.integer("text", 1 << 53) / (1 << 53) * sum(self.weights)
        for text, weight in zip(self.texts, self.weights, strict=True):
            point -= weight
            if point < 0:
                return text
        return self.texts[-1]


def keys_of(task: Task, reading: Reading) -> tuple[str, ...]:
    """Keys that a source of this task reads."""
    return KEYS[task] if reading.masks is None else (*KEYS[task], MASK)


def parse_row(row: Mapping[str, Any], task: Task, where: str, references: tuple[type, ...] = (str,)) -> Row:
    """Checks what `task` reads of a row.

    Args:
        where: file and row, for messages.
        references: types that stand for an image in this kind of file.

    Raises:
        UserError: a key is missing or of the wrong type; the message starts with `where`.
    """
    if task == "understand":
        context = _images(row, "image", "images", where, references, needed=False)
        messages = parse_messages(row, where)
        holes = sum(message.text.count(IMAGE_PLACEHOLDER) for message in messages)
        if holes != len(context):
            raise UserError(f"{where}: {holes} {IMAGE_PLACEHOLDER} placeholders for {len(context)} images")
        return Row(context=context, messages=messages)

    target = _images(row, "image", "image", where, references)[0]
    mask = next(iter(_images(row, MASK, MASK, where, references, needed=False)), None)
    if task == "image":
        return Row(target=target, mask=mask)
    if task == "text_to_image":
        return Row(target=target, mask=mask, texts=_texts(row, "text", where))
    context = _images(row, "source", "sources", where, references)
    return Row(target=target, mask=mask, context=context, texts=_texts(row, "instruction", where))


def parse_messages(row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """`conversations` (LLaVA: from, value) or `messages` (role, content) as messages; UserError when malformed."""
    turns = row.get("conversations", row.get("messages"))
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise UserError(f"{where}: needs 'conversations' or 'messages', a list of turns")
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        place = f"{where}, turn {number}"
        if not isinstance(turn, Mapping):
            raise UserError(f"{place}: must be an object with 'from' and 'value', or 'role' and 'content'")
        role = turn.get("from", turn.get("role"))
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(f"{place}: unknown role {role!r}. Choices: {', '.join(sorted(ROLES))}.")
        messages.append(Message(role=ROLES[role], text=_content(turn.get("value", turn.get("content")), place)))
    if not any(message.role == "assistant" for message in messages):
        raise UserError(f"{where}: no assistant turn to learn")
    return tuple(messages)


def make_sample(
    row: Row, *, id: str, task: Task, find: FindImage, reading: Reading, draws: ItemDraws, size: Size, fit_mode: FitMode
) -> Sample:
    """Reads a row's images. Target and the sources of an edit are fitted alike, so that they stay aligned; the images
    of a conversation keep their own size (`Reading.context`)."""
    text = row.text(draws)
    for words in (text, *(message.text for message in row.messages)):
        check_characters(words, id)
    # Where its images lie; a digest of their bytes tells later whether prepared data are of the same ones.
    profiles: list[str] = []
    references = [*(() if row.target is None else (row.target,)), *row.context]
    files = [find(reference) for reference in references]
    digested = xxhash.xxh3_64()
    if reading.digests:
        files = [file if isinstance(file, bytes) else read_file(file, id) for file in files]
        for file in files:
            digested.update(len(file).to_bytes(8, "little"))
            digested.update(file)
    target = files.pop(0) if row.target is not None else None

    def read(file: bytes | Path, at_least: Size | None) -> Image.Image:
        image = reading.read(file, id, at_least)
        if PROFILE in image.info:
            profiles.append(image.info[PROFILE])
        return image

    if task == "understand":
        context = tuple(reading.context(read(file, None)) for file in files)
    else:
        context = tuple(fit(read(file, size), size, fit_mode) for file in files)
    extra: dict[str, Any] = {DIGEST: digested.intdigest(), TEXTS: row.texts} if reading.digests else {}
    image = None if target is None or not reading.targets else fit(read(target, size), size, fit_mode)
    loss_mask = None
    if target is not None:
        mask = None if row.mask is None or reading.masks is None else find(row.mask)
        loss_mask = reading.mask(mask, id, target, size, fit_mode)
    return Sample(
        id=id,
        task=task,
        image=image,
        text=text,
        context_images=context,
        messages=row.messages,
        loss_mask=loss_mask,
        size=size if target is not None and image is None else None,
        extra={**extra, PROFILES: tuple(profiles)} if profiles else extra,
    )


def request_content(sample: Sample) -> int:
    """A digest (64 bits) of the image files and all texts of an item that was read with `Reading.digests`."""
    digested = xxhash.xxh3_64(sample.extra[DIGEST].to_bytes(8, "little"))
    for text in sample.extra[TEXTS]:
        encoded = text.encode()
        digested.update(len(encoded).to_bytes(8, "little"))
        digested.update(encoded)
    return digested.intdigest()


def read_file(path: Path, id: str) -> bytes:
    """The bytes of an image file; BadItem where it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BadItem(id, f"image file missing ({path})") from None
    except OSError as error:
        raise BadItem(id, f"image file not readable ({error.strerror or error})") from error


def check_characters(text: str, id: str) -> None:
    """BadItem for half of a surrogate pair, which JSON can hold and no encoding can, and for a null character."""
    if "\0" in text:
        raise BadItem(id, "text holds a null character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadItem(id, f"text holds half of a character (lone surrogate at {error.start})") from error


def usable_text(text: str, id: str) -> str:
    """`text` stripped; BadItem when nothing is left."""
    stripped = text.strip()
    if not stripped:
        raise BadItem(id, "empty caption")
    return stripped


def _content(content: object, where: str) -> str:
    """A string, or a list of {"type": "text", "text"} and {"type": "image"} parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise UserError(f"{where}: text must be a string, not {kind(content)}")
    pieces: list[str] = []
    for part in content:
        sort = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else None
        if sort == "image":
            pieces.append(IMAGE_PLACEHOLDER)
        elif sort == "text" and isinstance(text, str):
            pieces.append(text)
        else:
            raise UserError(f"{where}: a part must be a text with 'text' or an image, not {part!r}")
    return "\n".join(pieces)


def _texts(row: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    value = row.get(name)
    if value is None:
        raise UserError(f"{where}: {name!r} is missing")
    return tuple(text_list(value, name, where))


def _images(
    row: Mapping[str, Any], one: str, many: str, where: str, references: tuple[type, ...], needed: bool = True
) -> tuple[Any, ...]:
    """The references under `one` or `many`; either may hold one image or a list, as files in the wild do."""
    if one != many and row.get(one) is not None and row.get(many) is not None:
        raise UserError(f"{where}: has both {one!r} and {many!r}; give one")
    name = one if row.get(one) is not None else many
    value = row.get(name)
    if value is None:
        if needed:
            raise UserError(f"{where}: {one!r} is missing")
        return ()
    values = (
        tuple(value) if one != many and isinstance(value, Sequence) and not isinstance(value, str | bytes) else (value,)
    )
    wanted = " or ".join(type.__name__ for type in references)
    for item in values:
        if not isinstance(item, references) or not item:
            raise UserError(f"{where}: {name!r} must be an image ({wanted}), not {kind(item)}")
    if needed and not values:
        raise UserError(f"{where}: {name!r} is empty")
    return values
