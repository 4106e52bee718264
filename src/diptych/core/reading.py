"""Text, JSON and YAML that a user gave, read strictly: what is wrong with a file is one line that names it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from diptych.core.errors import UserError

try:
    from yaml import CSafeLoader as Parser
except ImportError:  # built without libyaml
    from yaml import SafeLoader as Parser

MOST = 1_000_000
"""Values of a YAML file after its aliases are written out."""
OPENING = re.compile(r"[\[{?:-]")
"""What may open one more level of YAML."""
DEEPEST = 5_000
MARKS = {b"\xff\xfe\x00\x00": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_text(path: Path, what: str | None = None) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
        what: how the message calls the file, its path when not given.

    Raises:
        UserError: no such file, not readable, or another encoding.
    """
    name = what or str(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{name}: no such file") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a null character in the name
        raise UserError(f"{name}: no such file") from error
    return utf8(data, name)


def utf8(data: bytes, name: str) -> str:
    """Bytes as text; UserError where they are no UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        mark = next((name for start, name in MARKS.items() if data.startswith(start)), None)
        kind = f"it is {mark}" if mark else f"byte {error.start + 1} is {data[error.start]:#04x}"
        raise UserError(f"{name}: not UTF-8 ({kind}); save it as UTF-8") from error


def read_json(path: Path, what: str | None = None) -> Any:
    """The value in a JSON file; UserError names the file and the line of a fault."""
    return json_value(read_text(path, what), what or str(path))


def json_value(text: str, name: str) -> Any:
    """The value that JSON text holds; as `read_json`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: not JSON (line {error.lineno}: {error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not JSON that can be read ({reason(error)})") from error


def read_object(path: Path, what: str | None = None) -> dict[str, Any]:
    """The object in a JSON file; UserError also where it holds something else."""
    value = read_json(path, what)
    if not isinstance(value, dict):
        raise UserError(f"{what or path}: holds {kind(value)} in place of a JSON object")
    return value


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def check_model_files(folder: Path) -> Path:
    """The folder; UserError names a file that transformers would stumble over: JSON that holds no object, a chat
    template that is no text."""
    for name in (*TOKENIZER_FILES, *PROCESSOR_FILES):
        if (folder / name).is_file():
            read_object(folder / name)
    for path in folder.glob("*.jinja"):
        read_text(path)
    return folder


def kind(value: Any) -> str:
    """What a plain value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


class _Strict(yaml.constructor.SafeConstructor):
    """YAML without repeated keys and without numbers of base sixty (16:9 is 969) and eight (012 is 10), which nobody
    means; nothing in it is ever run."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # `!!timestamp x`, `!!int ''`, 2020-13-45
            kind, shown = node.tag.rpartition(":")[2], node.value if isinstance(node, yaml.ScalarNode) else "this"
            shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
            raise yaml.constructor.ConstructorError(None, None, f"{shown!r} is no {kind}", node.start_mark) from error

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        whole = node.tag == "tag:yaml.org,2002:int"
        value = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        if ":" in node.value or re.fullmatch(r"[-+]?0[0-9_]+", node.value):
            problem = f"{node.value} is {value} to YAML; write that, or quote the text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return value


class _StrictLoader(_Strict, yaml.SafeLoader):
    """Its faults are told in PyYAML's own words."""


class _FastLoader(_Strict, Parser):  # pyright: ignore[reportGeneralTypeIssues]
    """libyaml's parser, where PyYAML was built with it: nine times as fast."""


for _loader in (_StrictLoader, _FastLoader):
    for _tag in ("int", "float"):
        _loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _loader.construct_number)


def read_yaml(path: Path, what: str | None = None) -> Any:
    """The value in a YAML file; UserError names the file and the line of a fault, a repeated key being one."""
    return yaml_value(read_text(path, what), what or str(path))


def yaml_value(text: str, name: str) -> Any:
    """The value that YAML text holds; as `read_yaml`."""
    try:
        value = _parsed(text)
        expanded(value, {})
        return value
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark and "\n" in text else ""
        raise UserError(f"{name}{place}: not valid YAML ({getattr(error, 'problem', None) or error})") from error
    except (ValueError, RecursionError, OverflowError) as error:
        raise UserError(f"{name}: not YAML that can be read ({reason(error)})") from error


def _parsed(text: str) -> Any:
    """libyaml's answer where it has one. PyYAML's own parser reads again what that refuses, since its words say more,
    and alone what could nest very deep, since nothing bounds the recursion around libyaml."""
    if len(OPENING.findall(text)) <= DEEPEST:
        with contextlib.suppress(yaml.YAMLError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
            return yaml.load(text, _FastLoader)
    return yaml.load(text, _StrictLoader)


def expanded(value: Any, known: dict[int, int]) -> int:
    """How many values there are when every alias is written out; ValueError where that has no end, or is too many."""
    if not isinstance(value, dict | list):
        return 1
    if known.get(id(value)) == 0:
        raise ValueError("an alias inside what it stands for")
    if id(value) not in known:
        known[id(value)] = 0
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(expanded(each, known) for each in inner)
    if known[id(value)] > MOST:
        raise ValueError(f"its aliases stand for more than {MOST:,} values")
    return known[id(value)]


def reason(error: Exception) -> str:
    """An exception in a few words."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return (str(error).strip().splitlines() or [type(error).__name__])[0].partition(";")[0]
