"""The node pack for ComfyUI, against a stand-in of its published V3 interface (`comfy_api.latest`)."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import diptych

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"


@dataclass
class Port:
    """An input or output of the stand-in. Only what ComfyUI documents is taken."""

    kind: str
    id: str | None
    options: dict[str, Any]


def type_of(kind: str, *allowed: str) -> Any:
    """One of ComfyUI's types, with `Input` and `Output`."""

    def made(id: str, **options: Any) -> Port:
        assert set(options) <= {"default", "tooltip", "optional", *allowed}, options
        return Port(kind, id, options)

    def output(id: str | None = None, display_name: str | None = None) -> Port:
        return Port(kind, id, {"display_name": display_name})

    return SimpleNamespace(Input=made, Output=output)


@dataclass
class Schema:
    node_id: str
    display_name: str
    category: str
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)


class NodeOutput:
    def __init__(self, *values: Any) -> None:
        self.values = values


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The pack's nodes by id, as ComfyUI finds them."""
    numbers = ("min", "max", "step", "control_after_generate")
    latest: Any = ModuleType("comfy_api.latest")
    latest.ComfyExtension = type("ComfyExtension", (), {})
    latest.io = SimpleNamespace(
        ComfyNode=type("ComfyNode", (), {}),
        Schema=Schema,
        NodeOutput=NodeOutput,
        Custom=type_of,
        Int=type_of("INT", *numbers),
        Float=type_of("FLOAT", *numbers),
        String=type_of("STRING", "multiline"),
        Combo=type_of("COMBO", "options"),
        Image=type_of("IMAGE"),
    )
    monkeypatch.setitem(sys.modules, "comfy_api", ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    spec = importlib.util.spec_from_file_location("pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    assert spec is not None
    assert spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pack", pack)
    spec.loader.exec_module(pack)
    extension = asyncio.run(pack.comfy_entrypoint())
    assert isinstance(extension, latest.ComfyExtension)
    yield {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}
    sys.modules.pop("pack.nodes", None)


class Model:
    """Stands for a loaded model and keeps what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def generate(self, prompt: str, **options: Any) -> list[Tensor]:
        self.calls.append((prompt, options))
        return [torch.full((3, 4, 6), value) for value in torch.linspace(-1, 1, options["n"])]

    def edit(self, images: list[Tensor], instruction: str, **options: Any) -> list[Tensor]:
        self.calls.append((images, instruction, options))
        return [images[0] * 2 - 1]

    def ask(self, images: list[Tensor] | None, question: str, **options: Any) -> str:
        self.calls.append((images, question, options))
        return "two"


def test_every_node_takes_what_its_schema_says(nodes: dict[str, Any]) -> None:
    assert list(nodes) == ["DiptychLoad", "DiptychGenerate", "DiptychEdit", "DiptychAsk"]
    for node in nodes.values():
        schema = node.define_schema()
        names = {port.id for port in schema.inputs}
        wanted = node.execute.__func__.__code__
        assert set(wanted.co_varnames[1 : wanted.co_argcount]) == names
        assert schema.category == "diptych"
    assert tomllib.loads((PACK / "pyproject.toml").read_text())["project"]["dependencies"] == ["diptych"]


def test_load(nodes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        diptych, "load", lambda name, **options: calls.append((name, options)) or "model", raising=False
    )
    out = nodes["DiptychLoad"].execute("toy/iomm", "a.safetensors:0.5\n\n b \n", "nf4", "none")
    assert out.values == ("model",)
    assert calls == [("toy/iomm", {"lora": ["a.safetensors:0.5", "b"], "quantize": "nf4", "offload": "none"})]


def test_pictures_come_and_go_in_comfyui_s_form(nodes: dict[str, Any]) -> None:
    model = Model()
    (drawn,) = nodes["DiptychGenerate"].execute(model, "a frog", 2, 7, 0, 0.0).values
    assert drawn.shape == (2, 4, 6, 3)
    assert (drawn.min(), drawn.max()) == (0, 1)
    assert model.calls[-1] == ("a frog", {"n": 2, "seed": 7, "output_type": "pt"})
    nodes["DiptychGenerate"].execute(model, "a frog", 1, 7, 12, 3.5)
    assert model.calls[-1][1] == {"n": 1, "seed": 7, "output_type": "pt", "steps": 12, "cfg": 3.5}
    image = torch.rand(2, 4, 6, 3)
    (edited,) = nodes["DiptychEdit"].execute(model, image, "make it blue", 1, 0, 0.0).values
    torch.testing.assert_close(edited, image[:1])
    assert [tuple(each.shape) for each in model.calls[-1][0]] == [(3, 4, 6)] * 2
    assert nodes["DiptychAsk"].execute(model, "how many?", 8).values == ("two",)
    assert model.calls[-1] == (None, "how many?", {"max_new_tokens": 8})
