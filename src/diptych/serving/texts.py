"""JSON and forms of requests, read strictly: names that are given once, texts that are Unicode, nothing nested without
end."""

from __future__ import annotations

import json
from typing import Any

from starlette.formparsers import MultiPartException, MultiPartParser

from diptych.serving.errors import ApiError, bad


class Twice(Exception):
    """An object of JSON gives a name twice."""


def parsed(body: bytes, param: str | None = None) -> Any:
    """What JSON in UTF-8 stands for.

    Args:
        param: the field that it is the value of; None for the whole body.

    Raises:
        ApiError: no JSON, a name that an object gives twice, or half of a character.
    """
    what = "the body" if param is None else param
    code = "invalid_json" if param is None else "invalid_type"
    try:
        text = body.decode("utf-8-sig")
        values = json.loads(text, object_pairs_hook=once)
        # JSON may escape halves of a pair of surrogates, which no text can hold.
        halves = "\\ud" in text or "\\uD" in text
        place = broken_text(values, param or "") if halves else None
    except Twice as error:
        raise ApiError(400, f"{what}: {error} is given twice", param=param, code="invalid_json") from None
    except (ValueError, RecursionError):
        raise ApiError(400, f"{what} is not JSON", param=param, code=code) from None
    if place is not None:
        raise bad(place, "is not valid Unicode")
    return values


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, each of whose names is given once."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Twice(repr(twice[:100]))
    return made


def broken_text(value: Any, place: str) -> str | None:
    """Where in a value a text is not Unicode, as in `messages[0].content`; None where all are."""
    if isinstance(value, str):
        return None if is_unicode(value) else place
    if isinstance(value, dict):
        if not all(map(is_unicode, value)):
            return place or "body"
        inside = [(each, f"{place}.{name}" if place else name) for name, each in value.items()]
    elif isinstance(value, list):
        inside = [(each, f"{place}[{number}]") for number, each in enumerate(value)]
    else:
        return None
    return next((broken for each, name in inside if (broken := broken_text(each, name)) is not None), None)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can write a text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class FormParser(MultiPartParser):
    """Starlette's, which would read texts that are not UTF-8 as Latin-1."""

    def on_part_end(self) -> None:
        part = self._current_part
        if part.file is None:
            try:
                part.data.decode("utf-8")
            except UnicodeDecodeError:
                raise MultiPartException(f"the text of {part.field_name[:100]!r} is not UTF-8") from None
        super().on_part_end()
