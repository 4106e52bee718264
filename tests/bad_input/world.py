"""Files of every kind, sound or damaged, from a line of data; and a command run on them in this process."""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import re
import shlex
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from diptych.cli.main import main

DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "int64")}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An input and what the command says of it.

    files: by path, see `make`. run: the command after `diptych`, where {tiny}, {mllm} and {recipe} are a sound model,
    a sound backbone and a sound recipe. says: a regular expression that is found in the error, or where the code is 0
    in the output. code: the exit code. env: environment variables.
    """

    id: str
    run: str
    says: str
    code: int = 2
    files: dict[str, Any] = field(default_factory=dict[str, Any])
    env: dict[str, str] = field(default_factory=dict[str, str])


def entries(path: Path) -> list[Entry]:
    """The entries of a file, one JSON object a line."""
    return [Entry(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def make(path: Path, content: Any, places: dict[str, str]) -> None:
    """A file, link or folder from its description.

    A string is text. A mapping holds one of: text (with encoding), hex, base64, repeat (a text and how often), json,
    yaml, recipe (values over the sound recipe's), image (size, mode, format, text: what a PNG says of itself, and cut:
    bytes that are left), safetensors (name: [shape, dtype, value]), raw (a header of safetensors as text or JSON, and
    how many bytes follow), tar (a list of [name, content]), parquet (columns), model (a copy of a sound model: `config`
    are values put into its config.json, `files` are added, `remove` are removed, `tensors` a mapping of names to
    values), link (a target), folder (true), fifo (true); and mode, the rights.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = {"text": content}
    if "folder" in content:
        path.mkdir(exist_ok=True)
    elif "link" in content:
        path.symlink_to(content["link"])
    elif "fifo" in content:
        os.mkfifo(path)
    elif "model" in content:
        make_model(path, content, places)
    elif "tar" in content:
        with tarfile.open(path, "w") as tar:
            for name, inner in content["tar"]:
                data = data_of(inner, places)
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    elif "parquet" in content:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(decoded(content["parquet"], places)), path)
    elif "safetensors" in content:
        save_file({name: tensor(spec) for name, spec in content["safetensors"].items()}, path)
    else:
        path.write_bytes(data_of(content, places))
    if "mode" in content:
        path.chmod(int(content["mode"], 8))


def decoded(value: Any, places: dict[str, str]) -> Any:
    """A value with what stands for bytes ({hex: ...}, {image: ...}) as bytes."""
    if isinstance(value, dict) and (isinstance(value.get("hex"), str) or isinstance(value.get("image"), dict)):
        return data_of(value, places)
    if isinstance(value, dict):
        return {name: decoded(each, places) for name, each in value.items()}
    return [decoded(each, places) for each in value] if isinstance(value, list) else value


def tensor(spec: list[Any]) -> torch.Tensor:
    shape, dtype, value = spec
    return torch.full(shape, float(value)).to(DTYPES[dtype])


def data_of(content: Any, places: dict[str, str]) -> bytes:
    """The bytes of a file."""
    if isinstance(content, str):
        return content.encode()
    if "text" in content:
        return filled(content["text"], places).encode(content.get("encoding", "utf-8"), "surrogatepass")
    if "hex" in content:
        return bytes.fromhex(content["hex"])
    if "base64" in content:
        return base64.b64decode(content["base64"])
    if "repeat" in content:
        return "".join(text * times for text, times in content["repeat"]).encode()
    if "json" in content:
        return json.dumps(content["json"]).encode()
    if "yaml" in content:
        return yaml.safe_dump(content["yaml"]).encode()
    if "recipe" in content:
        return yaml.safe_dump({"base": places["recipe"], **content["recipe"]}).encode()
    if "raw" in content:
        head, size = content["raw"]
        text = (head if isinstance(head, str) else json.dumps(head)).encode()
        return len(text).to_bytes(8, "little") + text + bytes(size)
    if "image" in content:
        about = content["image"]
        width, height = about.get("size", [32, 32])
        noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        words = PngInfo()
        for name, said in about.get("text", {}).items():
            words.add_itxt(name, said)
        options = {"pnginfo": words} if about.get("text") else {}
        Image.fromarray(noise).convert(about.get("mode", "RGB")).save(buffer, about.get("format", "PNG"), **options)
        return buffer.getvalue()[: about.get("cut")]
    raise AssertionError(f"no such content: {content}")


def make_model(path: Path, content: dict[str, Any], places: dict[str, str]) -> None:
    source = Path(places[content["model"]])
    for file in source.rglob("*"):
        target = path / file.relative_to(source)
        if file.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    for name in content.get("remove", ()):
        (path / name).unlink()
    for name, values in content.get("config", {}).items():
        file = path / name
        data = json.loads(file.read_text())
        for key, value in values.items():
            put(data, key, value)
        file.write_text(json.dumps(data))
    for name, inner in content.get("files", {}).items():
        (path / name).unlink(missing_ok=True)
        make(path / name, inner, places)
    for name, change in content.get("tensors", {}).items():
        file = path / name
        weights = load_file(file)
        for key, value in change.items():
            first = next(iter(sorted(weights))) if key == "*" else key
            if value is None:
                del weights[first]
            elif isinstance(value, list):
                weights[first] = tensor(value)
            else:
                weights[first] = weights[first].clone()
                weights[first].view(-1)[0] = float(value)
        save_file(weights, file, metadata={"format": "pt"})


def put(data: Any, key: str, value: Any) -> None:
    """Set a dotted key; null removes it."""
    *above, last = key.split(".")
    for name in above:
        data = data[name]
    if value is None:
        data.pop(last)
    else:
        data[last] = copy.deepcopy(value)


def filled(text: str, places: dict[str, str]) -> str:
    """`text` with the places' names in braces replaced."""
    return re.sub(r"\{(" + "|".join(places) + r")\}", lambda match: places[match[1]], text)


def run(entry: Entry, folder: Path, places: dict[str, str]) -> int:
    """Make the files below `folder`, which is the current one, and run the command; its exit code."""
    for name, content in entry.files.items():
        make(folder / name, content, places)
    return main([filled(word, places) for word in shlex.split(entry.run)])
