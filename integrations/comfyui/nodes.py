"""Nodes that load a Diptych MODEL, generate, edit and ask (ComfyUI's V3 schema).

A picture is a tensor (B, H, W, 3) of floats in 0..1, as everywhere in ComfyUI.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import ComfyExtension, io
from torch import Tensor

CATEGORY = "diptych"
Model = io.Custom("DIPTYCH_MODEL")
OWN = 0
"""Of steps and guidance: the model's own."""


def sampling_inputs() -> list[Any]:
    return [
        io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=True),
        io.Int.Input("steps", default=OWN, min=0, max=1000, tooltip="0 for the model's own"),
        io.Float.Input("cfg", default=OWN, min=0.0, max=100.0, step=0.1, tooltip="guidance; 0 for the model's own"),
    ]


def settings(steps: int, cfg: float) -> dict[str, Any]:
    """What differs from the model's own sampling."""
    given = {"steps": steps, "cfg": cfg}
    return {name: value for name, value in given.items() if value != OWN}


def to_comfy(images: list[Tensor]) -> Tensor:
    """Images (3, H, W) in [-1, 1] as one tensor of ComfyUI's."""
    return torch.stack([(image.permute(1, 2, 0) + 1) / 2 for image in images])


def to_diptych(images: Tensor) -> list[Tensor]:
    """ComfyUI's images as Diptych takes them, (3, H, W) in 0..1; transparency stays."""
    return [image.permute(2, 0, 1).clamp(0, 1) for image in images]


class Load(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiptychLoad",
            display_name="Diptych: load",
            category=CATEGORY,
            inputs=[
                io.String.Input("name", default="toy/iomm", tooltip="a shipped name, a run, a folder or a hub id"),
                io.String.Input(
                    "loras", default="", multiline=True, tooltip="files, one a line: style.safetensors:0.8"
                ),
                io.Combo.Input("quantize", options=["none", "int8", "fp8", "nf4"], default="none"),
                io.Combo.Input("offload", options=["none", "model", "layers"], default="none"),
            ],
            outputs=[Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, name: str, loras: str, quantize: str, offload: str) -> io.NodeOutput:
        import diptych

        files = [line.strip() for line in loras.splitlines() if line.strip()]
        options: Any = {"quantize": quantize, "offload": offload}
        return io.NodeOutput(diptych.load(name, lora=files, **options))


class Generate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiptychGenerate",
            display_name="Diptych: generate",
            category=CATEGORY,
            inputs=[
                Model.Input("model"),
                io.String.Input("prompt", multiline=True),
                io.Int.Input("images", default=1, min=1, max=64),
                *sampling_inputs(),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, model: Any, prompt: str, images: int, seed: int, steps: int, cfg: float) -> io.NodeOutput:
        drawn = model.generate(prompt, n=images, seed=seed, output_type="pt", **settings(steps, cfg))
        return io.NodeOutput(to_comfy(drawn))


class Edit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiptychEdit",
            display_name="Diptych: edit",
            category=CATEGORY,
            inputs=[
                Model.Input("model"),
                io.Image.Input("image", tooltip="one image, or a batch that the instruction refers to"),
                io.String.Input("instruction", multiline=True),
                *sampling_inputs(),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, model: Any, image: Tensor, instruction: str, seed: int, steps: int, cfg: float) -> io.NodeOutput:
        edited = model.edit(to_diptych(image), instruction, seed=seed, output_type="pt", **settings(steps, cfg))
        return io.NodeOutput(to_comfy(edited))


class Ask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiptychAsk",
            display_name="Diptych: ask",
            category=CATEGORY,
            inputs=[
                Model.Input("model"),
                io.Image.Input("image", optional=True),
                io.String.Input("question", multiline=True),
                io.Int.Input("max_new_tokens", default=256, min=1, max=8192),
            ],
            outputs=[io.String.Output(display_name="answer")],
        )

    @classmethod
    def execute(cls, model: Any, question: str, max_new_tokens: int, image: Tensor | None = None) -> io.NodeOutput:
        pictures = None if image is None else to_diptych(image)
        return io.NodeOutput(model.ask(pictures, question, max_new_tokens=max_new_tokens))


class DiptychExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [Load, Generate, Edit, Ask]


async def comfy_entrypoint() -> DiptychExtension:
    return DiptychExtension()
