"""Where plain values differ."""

from __future__ import annotations

from diptych.core.differences import differences


def test_one_number_in_two_spellings_is_no_difference() -> None:
    """YAML reads 1e-4, without a dot, as text."""
    before = {"lr": 0.0001, "steps": 2, "name": "a", "on": True, "none": None}
    assert list(differences(before, {**before, "lr": "1e-4"})) == []
    for name, value in {"lr": "1e-5", "steps": 3, "name": "b", "on": 1.5, "none": 0}.items():
        assert list(differences(before, {**before, name: value})) == [((name,), before[name], value)]
