"""Numbers that documents and headers name are those of the code."""

from __future__ import annotations

import dataclasses
import importlib
import re
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from diptych.evaluation.evaluate import DRAWN
from diptych.evaluation.understanding.benchmarks import BENCHMARKS
from diptych.evaluation.understanding.profiles import PROFILES
from diptych.recipes import plain as plain_recipes
from diptych.recipes import recipe as recipes

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| [^|]+ \| `([\w./]+): ([\w.]+)` \| `([^`]+)` \| [^|]+ \|$")
ROWS = [
    match.groups() for line in (ROOT / "docs" / "choices.md").read_text().splitlines() if (match := ROW.match(line))
]
NAMES = plain_recipes.names()


@cache
def plain(name: str) -> dict[str, Any]:
    return recipes.load_plain(name)


def place(values: Any, key: str) -> Any:
    """A value by its dotted key; what a recipe leaves out is the default of its dataclass, or null."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else getattr(values, name)
        if values is None:
            return None
    return values


def test_every_row_of_choices_is_read() -> None:
    text = (ROOT / "docs" / "choices.md").read_text()
    tables = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| what |")]
    assert len(ROWS) == len(tables) > 40


@pytest.mark.parametrize(("where", "key", "value"), ROWS)
def test_choices_are_what_the_code_has(where: str, key: str, value: str) -> None:
    expected = yaml.safe_load(value)
    if where.startswith("diptych."):
        found = getattr(importlib.import_module(where), key)
        assert (list(found) if isinstance(found, tuple) else found) == expected
    else:
        found = place(plain(where), key)
        if found is None and expected is not None:
            found = place(recipes.load(where)[0], key)
        assert found == expected


# Headers of recipes


@cache
def numbers(name: str) -> frozenset[float]:
    """Every number of a resolved recipe, those in texts ("0.25") and powers of two left as they are."""
    found: set[float] = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for each in value.values():
                walk(each)
        elif isinstance(value, list | tuple):
            for each in value:
                walk(each)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.add(float(value))

    walk(plain(name))
    walk(dataclasses.asdict(recipes.load(name)[0]))
    for stage in plain(name)["stages"].values():
        rate = stage.get("optimizer", {}).get("lr")
        if rate:  # where a schedule begins and ends
            found |= {rate * stage.get("schedule", {}).get(end, 1.0) for end in ("start", "end")}
    return frozenset(found)


NAMED = {
    "rate": re.compile(r"(?<![\w.])(\d(?:\.\d+)?e-\d+)"),
    "batch": re.compile(r"\bbatch (?:of )?(\d[\d,]*)"),
    "steps": re.compile(r"(?<![\w.])(\d[\d,]*) steps\b"),
    "pixels": re.compile(r"(?<![\w.])(\d[\d,]*) px\b"),
}
OTHERS: dict[str, tuple[float, ...]] = {
    "iomm/b_finetune_mix_1024": (512,),  # of the pre-training, which the paper has at 512 px alone
    "iomm/l_finetune_mix_1024": (512,),
    "ovis_u1/six_stages": (448,),  # of the vision tower, in the backbone's published configuration
    "sgt/omnigen2/full": (4e-4,),  # the paper's, in another recipe
    "sgt/omnigen2/paper_rate": (5e-6, 8e-7),  # the release's
    "sgt/omnigen2/pilot/panoptic": (4e-4, 9000, 8),  # the paper's rate; steps and batch of the release's pilots
    "sgt/omnigen2/released": (5000,),  # steps of the release
    "sgt/ovis_u1": (4e-4,),  # the paper's for OmniGen2
    "sgt/iomm_b": (4e-4,),
}
"""Numbers of headers that are another's, and said to be."""


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_headers_are_the_recipes(name: str) -> None:
    text = " ".join(plain_recipes.header(name))
    for kind, pattern in NAMED.items():
        for match in pattern.finditer(text):
            value = float(match.group(1).replace(",", ""))
            known = (*numbers(name), *OTHERS.get(name, ()))
            assert any(abs(value - each) <= 1e-9 * max(1.0, value) or value == pytest.approx(each) for each in known), (
                f"{kind} {match.group(1)} is no number of {name}: {match.group(0)}"
            )


@pytest.mark.parametrize("name", NAMES)
def test_recipes_that_headers_name_are_there(name: str) -> None:
    families = "|".join(sorted({each.split("/")[0] for each in NAMES} - {"toy"}))
    for match in re.finditer(
        rf"(?<![\w./-])((?:{families})/[\w./]*\w)(?![\w{{*/])", " ".join(plain_recipes.header(name))
    ):
        if match.group(1).split("/")[0] not in ("toy",) and "." not in match.group(1).rsplit("/", 1)[-1]:
            assert match.group(1) in NAMES or any(each.startswith(match.group(1)) for each in NAMES), match.group(1)


def test_the_table_of_benchmarks_is_whole() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text()
    section = text.split("\n## Each benchmark: ")[1].split("\n## ")[0]
    rows = [
        line.split(" | ") for line in section.split("| task | prompt |")[1].splitlines()[2:] if line.startswith("|")
    ]
    assert all(len(row) == 5 for row in rows), "task, prompt, rule, source, and what differs"
    named = {name for row in rows for name in re.findall(r"`([\w*]+)`", row[0])}
    for task in (*DRAWN, *BENCHMARKS):
        assert any(fnmatch(task, pattern) for pattern in named), task
    for pattern in named:
        assert any(fnmatch(task, pattern) for task in (*DRAWN, *BENCHMARKS)), pattern
    limits = dict(re.findall(r"`(\w+)` (\d+)", section.split("the class's: ")[1].split(" |")[0]))
    classes = {name: profile.max_new_tokens for name, profile in PROFILES.items() if profile.max_new_tokens}
    assert {name: int(limit) for name, limit in limits.items()} == classes


def test_readme_names_what_there_is() -> None:
    text = (ROOT / "README.md").read_text()
    if match := re.search(r"(\d+) tasks of understanding", text):
        assert int(match.group(1)) == len(BENCHMARKS)
    table = text.split("\n## Recipes\n")[1].split("\n## ")[0]
    for pattern in re.findall(r"`([\w{},/*]+)`", " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))):
        for name in spelled(pattern):
            regex = re.compile(re.escape(name).replace(r"\*", ".*") + "$")
            assert any(regex.match(each) for each in NAMES), f"README names {name}, and there is no such recipe"


def spelled(pattern: str) -> list[str]:
    """`a/{b,c}_*` as its names."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    return [
        name
        for each in match.group(1).split(",")
        for name in spelled(pattern[: match.start()] + each + pattern[match.end() :])
    ]
