"""The faults of `mutants.py` can still be put in: each names text that its file holds, and tests that are there."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, ROOT


@pytest.mark.parametrize("name", MUTANTS)
def test_its_text_is_there(name: str) -> None:
    file, before, after, tests = MUTANTS[name]
    text = (ROOT / "src" / "diptych" / file).read_text(encoding="utf-8")
    assert before in text
    assert before != after
    assert (ROOT / tests).is_file()
