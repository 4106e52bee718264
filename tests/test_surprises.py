"""Every program of docs/surprises.md is run with the installed libraries and prints what the page says."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "surprises.md").read_text(encoding="utf-8")
ENTRY = re.compile(r"^### ([^\n]+)\n(.*?)(?=^###? |\Z)", re.MULTILINE | re.DOTALL)
ENTRIES = dict(ENTRY.findall(PAGE))


@pytest.mark.parametrize("title", ENTRIES)
def test_programs_print_what_the_page_says(title: str, capfd: pytest.CaptureFixture[str]) -> None:
    program = re.search(r"```python\n(.*?)```", ENTRIES[title], re.DOTALL)
    printed = re.search(r"```text\n(.*?)```", ENTRIES[title], re.DOTALL)
    assert program is not None
    assert printed is not None
    for name in re.findall(r"^(?:import|from) (datasets|webdataset|pandas|matplotlib|peft)", program[1], re.MULTILINE):
        pytest.importorskip(name)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a library may warn: what it does is what is shown
        exec(compile(program[1], title, "exec"), {"__name__": "surprise"})
    assert capfd.readouterr().out == printed[1]


@pytest.mark.parametrize("title", ENTRIES)
def test_entries_say_what_is_done_and_what_holds_it(title: str) -> None:
    done = ENTRIES[title].partition("**Diptych** ")[2]
    places = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", done)
    assert places
    for path, name in places:
        assert f"def {name}" in (ROOT / path).read_text(encoding="utf-8")
    for script in re.findall(r"`(findings/\w+\.sh)`", ENTRIES[title]):
        assert (ROOT / script).is_file()
