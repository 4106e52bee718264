"""YAML, read by libyaml where it can be and by PyYAML's own parser where that says more."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diptych.core import reading
from diptych.core.errors import UserError
from diptych.core.reading import yaml_value

TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT | st.dates()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
RECIPES = sorted(Path(reading.__file__).parents[1].glob("recipes/**/*.yaml"))


@given(VALUES, st.booleans())
def test_what_is_written_is_read_by_both_parsers(value: object, flow: bool) -> None:
    text = yaml.safe_dump(value, default_flow_style=flow, allow_unicode=True)
    assert yaml_value(text, "a.yaml") == yaml.load(text, reading._StrictLoader) == value


def test_both_parsers_read_every_recipe_alike() -> None:
    assert len(RECIPES) > 50
    for path in RECIPES:
        text = path.read_text()
        assert yaml.load(text, reading._FastLoader) == yaml.load(text, reading._StrictLoader)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: [1", "a.yaml:2: not valid YAML (expected ',' or ']', but got '<stream end>')"),
        ("a: 1\n\tb: 2", "a.yaml:2: not valid YAML (found character '\\t' that cannot start any token)"),
        ("a: 1\na: 2", "a.yaml:2: not valid YAML (the key 'a' twice)"),
        ("a: 16:9", "a.yaml: not valid YAML (16:9 is 969 to YAML; write that, or quote the text)"),
        ("a: &x [*x]", "a.yaml: not YAML that can be read (an alias inside what it stands for)"),
    ],
)
def test_faults_are_told_in_the_words_that_say_more(text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        yaml_value(text, "a.yaml")
    assert str(caught.value) == says


def test_deep_nesting_does_not_reach_libyaml(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[type] = []
    load = yaml.load
    monkeypatch.setattr(yaml, "load", lambda text, loader: asked.append(loader) or load(text, loader))
    assert yaml_value("[" * 20 + "]" * 20, "a.yaml") is not None
    with pytest.raises(UserError, match=r"a\.yaml: not YAML that can be read \(it is nested too deeply\)"):
        yaml_value("[" * (reading.DEEPEST + 1), "a.yaml")
    assert asked == [reading._FastLoader, reading._StrictLoader]
