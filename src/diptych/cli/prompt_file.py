"""A file of prompts: one a line, or JSON objects with seeds and options of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diptych.core.errors import UserError, unknown
from diptych.core.filenames import file_name
from diptych.core.files import LONGEST_NAME
from diptych.core.reading import json_value, read_text


@dataclass(frozen=True, kw_only=True)
class Line:
    """What a line asks for. seed, n: None for those of the command. options: fields of `Sampling`. name: of its files,
    without an ending."""

    prompt: str
    seed: int | None = None
    n: int | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    name: str = ""


def read_prompts(path: Path) -> list[Line]:
    """The lines of a .txt file (empty ones and those that begin with # are passed over) or a .jsonl file.

    Raises:
        UserError: an unreadable file, or a line that does not fit, by its number.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"--prompts {path}: a .txt file with a prompt a line, or a .jsonl file")
    rows = read_text(path, f"--prompts {path}").splitlines()
    lines: list[Line] = []
    for number, row in enumerate(rows, start=1):
        text = row.strip()
        if text and path.suffix == ".jsonl":
            lines.append(_object(text, f"{path}:{number}"))
        elif text and not text.startswith("#"):
            lines.append(Line(prompt=text))
    if not lines:
        raise UserError(f"--prompts {path}: no prompts in it")
    return lines


def _object(text: str, where: str) -> Line:
    from diptych.inference.sampling import Sampling, names

    values = json_value(text, where)
    if not isinstance(values, dict):
        raise UserError(f"{where}: an object with 'prompt' is needed, not {type(values).__name__}")
    fields = {name: values.pop(name) for name in ("prompt", "seed", "n", "name") if name in values}
    prompt = fields.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where}: 'prompt' is missing or empty")
    for name in ("seed", "n"):
        if name in fields and (
            not isinstance(fields[name], int) or isinstance(fields[name], bool) or fields[name] < (name == "n")
        ):
            raise UserError(f"{where}: {name} must be a whole number, not {fields[name]!r}")
    if fields.get("seed", 0) >= 2**63:
        raise UserError(f"{where}: seed must be below 2^63, not {fields['seed']}")
    name = fields.get("name", "x")
    if not isinstance(name, str) or name.startswith(".") or len(name) > LONGEST_NAME or file_name(name) != name:
        raise UserError(f"{where}: name must be a plain file name without a folder, not {name!r}")
    allowed = [name for name in names() if name not in ("edit", "batch_size")]
    for name in values:
        if name not in allowed:
            raise unknown("key", name, ["prompt", "seed", "n", "name", *allowed], where)
    try:
        Sampling().over(values)
    except (UserError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error
    return Line(options=values, **fields)


def file_names(prompts: Sequence[str], given: Sequence[str] | None = None) -> list[str]:
    """A name for each prompt: its first words, with a number where another one has the same."""
    names: list[str] = []
    for place, prompt in enumerate(prompts):
        wanted = (given[place] if given else "") or stem(prompt)
        name, number = wanted, 2
        while name in names:
            name, number = f"{wanted}-{number}", number + 1
        names.append(name)
    return names


def stem(text: str) -> str:
    """A file name made of a prompt's first words."""
    letters = "".join(letter if letter.isalnum() else " " for letter in text.lower())
    return "-".join(letters.split()[:8])[:60] or "image"
