"""Ranges beside types, and files that a user gave, read strictly."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
from annotated_types import Ge, Interval

from diptych.core.errors import UserError, attributed_to
from diptych.core.ranges import Count, Positive, Share, check_ranges
from diptych.core.reading import read_json, read_object, read_text, read_yaml


@dataclass(frozen=True, kw_only=True)
class Settings:
    plain: float = 0.0
    share: Share = 0.5
    pair: tuple[Share, Share] = (0.0, 1.0)
    many: tuple[Positive, ...] = (1.0,)
    named: dict[str, Positive] = field(default_factory=dict[str, float])
    maybe: Count | None = None
    either: Count | tuple[Count, Count] = 1
    both: Annotated[int, Ge(0), Interval(lt=9)] = 3
    flag: bool = True


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"plain": float("nan")}, "plain must be a finite number, not nan"),
        ({"share": 1.5}, r"share must be at least 0 and at most 1, not 1\.5"),
        ({"share": float("-inf")}, "share must be a finite number"),
        ({"pair": (0.0, 2.0)}, r"pair\[1\] must be"),
        ({"many": (1.0, 0.0)}, r"many\[1\] must be above 0, not 0\.0"),
        ({"named": {"flow": -1.0}}, r"named\.flow must be above 0"),
        ({"maybe": 0}, "maybe must be at least 1, not 0"),
        ({"either": (1, 0)}, r"either\[1\] must be at least 1"),
        ({"both": -1}, "both must be at least 0"),
        ({"both": 9}, "both must be below 9"),
    ],
)
def test_what_is_out_of_range_is_named(values: dict[str, Any], message: str) -> None:
    check_ranges(Settings())
    with pytest.raises(UserError, match=message):
        check_ranges(Settings(**values))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xfea\0", r"f: not UTF-8 \(it is UTF-16\)"),
        (b"\xff\xfe\0\0a\0\0\0", "it is UTF-32"),
        (b"ab\xe4", r"byte 3 is 0xe4\); save it as UTF-8"),
    ],
)
def test_other_encodings_are_named(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(data)
    for read in (read_text, read_json, read_yaml):
        with pytest.raises(UserError, match=message):
            read(tmp_path / "f")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "f") == read_yaml(tmp_path / "f") == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: Expecting value"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "Exceeds the limit"),
        ("[]", "holds a list in place of a JSON object"),
        ("null", "holds null"),
    ],
)
def test_json_that_is_none(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_text(text)
    with pytest.raises(UserError, match=message):
        read_object(tmp_path / "f", "the file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f:3: not valid YAML .*the key 'a' twice"),
        ("a: {b: 1, b: 2}\n", "f:1: not valid YAML .*the key 'b' twice"),
        ("a: &a [*a]\n", "an alias inside what it stands for"),
        ("a: 2020-13-40\n", "f:1: not valid YAML \\('2020-13-40' is no timestamp"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: 1\nb: [16:9]\n", "f:2: not valid YAML .*16:9 is 969 to YAML"),
        ("a: 012\n", "012 is 10 to YAML"),
        ("a: 1:30.5\n", "1:30\\.5 is 90.5 to YAML"),
        ("a: !!python/name:os.system\n", "could not determine a constructor"),
    ],
)
def test_yaml_that_is_none(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_text(text)
    with pytest.raises(UserError, match=message):
        read_yaml(tmp_path / "f")


def test_aliases_that_explode_are_refused_and_merges_are_not(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (tmp_path / "f").write_text("\n".join(rows))
    with pytest.raises(UserError, match="its aliases stand for more than 1,000,000 values"):
        read_yaml(tmp_path / "f")
    (tmp_path / "f").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert read_yaml(tmp_path / "f")["b"] == {"x": 1, "y": 3}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_text(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_text(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        read_text(Path("a\0b"))


def test_errors_are_attributed_and_errors_of_the_system_are_not() -> None:
    with pytest.raises(UserError, match=r"config\.json: KeyError: 'x'"), attributed_to("config.json"):
        raise KeyError("x")
    with pytest.raises(UserError, match="mine"), attributed_to("config.json"):
        raise UserError("mine")
    with pytest.raises(RuntimeError, match="out of memory"), attributed_to("config.json"):
        raise RuntimeError("out of memory")
    with pytest.raises(OSError, match="full"), attributed_to("config.json"):
        raise OSError(28, "full")
