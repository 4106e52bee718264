"""Where the caption of an item stands: which keys of its record hold texts, and how often each is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diptych.core.errors import UserError

TextSetting = str | Sequence[str] | Mapping[str, float]
"""As a recipe says it: one key, several, or their weights."""


@dataclass(frozen=True)
class TextKeys:
    """Keys of a record that hold texts, and their weights. A key may lead into nested objects ("captions.short"), and
    what it holds may be a list, whose texts share the key's weight.

    preferred: only the first key that is there counts; the weights mean nothing then.
    """

    names: tuple[str, ...] = ("text", "caption")
    weights: tuple[float, ...] = (1.0, 1.0)
    preferred: bool = True

    def texts(self, record: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """The texts of a record, stripped, and their weights.

        Raises:
            UserError: none of the keys is there, or one holds something else than texts; the message starts with
                `where`.
        """
        texts: list[str] = []
        weights: list[float] = []
        for name, weight in zip(self.names, self.weights, strict=True):
            value = lookup(record, name)
            if value is None:
                continue
            listed = text_list(value, name, where)
            texts += listed
            weights += [weight / len(listed)] * len(listed)
            if self.preferred:
                break
        if not texts:
            raise UserError(f"{where}: {' or '.join(repr(name) for name in self.names)} is missing")
        return tuple(texts), tuple(weights)


def text_keys(setting: TextSetting | None, where: str) -> TextKeys:
    """`text` of a source as `TextKeys`; UserError for weights that are no weights."""
    if setting is None:
        return TextKeys()
    if "" in ((setting,) if isinstance(setting, str) else setting):
        raise UserError(f"{where}: text: a key is empty")
    if isinstance(setting, str):
        return TextKeys((setting,), (1.0,), preferred=False)
    weights = dict(setting) if isinstance(setting, Mapping) else dict.fromkeys(setting, 1.0)
    if not weights:
        raise UserError(f"{where}: text: give at least one key")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"{where}: text: the weight of {name!r} must be a number above 0, not {weight!r}")
    return TextKeys(tuple(weights), tuple(map(float, weights.values())), preferred=False)


def lookup(record: Mapping[str, Any], name: str) -> Any:
    """What a record has under a key, or under a path of keys with dots between; None where it has nothing."""
    if name in record or "." not in name:
        return record.get(name)
    first, _, rest = name.partition(".")
    inner = record.get(first)
    return lookup(inner, rest) if isinstance(inner, Mapping) else None


def text_list(value: Any, name: str, where: str) -> list[str]:
    """A text or a list of texts as a list, stripped; UserError for anything else, and for an empty text."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: {name!r} must be a string or a list of strings, not {kind(value)}")
    if not texts or not all(text.strip() for text in texts):
        raise UserError(f"{where}: {name!r} is empty")
    return [text.strip() for text in texts]


def check_text(text: str, name: str, where: str) -> None:
    """UserError for a text with half a character of UTF-16 or a null character, which no tokenizer takes."""
    if "\0" in text:
        raise UserError(f"{where}: {name} holds a null character")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{where}: {name} is not valid Unicode (it holds a lone surrogate)")


def kind(value: object) -> str:
    """What a value is called in messages."""
    return {"str": "an empty string", "dict": "an object", "list": "a list", "NoneType": "null"}.get(
        type(value).__name__, type(value).__name__
    )
