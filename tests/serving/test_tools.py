"""The tools for agents, as the official MCP client uses them."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

import diptych
from serving_process import Running

mcp = pytest.importorskip("mcp")
PROMPT = "a red circle left of a blue square"


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def test_a_client_lists_the_tools_and_makes_and_edits_a_picture(server: Running) -> None:
    async def talk() -> tuple[list[str], Any, Any, Any, Any]:
        async with mcp.Client(f"{server.address}/mcp") as client:
            names = [tool.name for tool in (await client.list_tools()).tools]
            made = await client.call_tool("generate_image", {"prompt": PROMPT, "seed": 3})
            told = {"image": made.content[0].data, "model": "toy/ovis-u1"}
            edited = await client.call_tool(
                "edit_image", {**told, "instruction": "make the background navy", "seed": 4}
            )
            answer = await client.call_tool("ask_about_image", {**told, "question": "what color is the circle?"})
            wrong = await client.call_tool("edit_image", {**told, "image": "@@@", "instruction": "a"})
            return names, made, edited, answer, wrong

    names, made, edited, answer, wrong = asyncio.run(talk())
    assert set(names) == {"list_models", "generate_image", "edit_image", "ask_about_image"}
    first = Image.open(io.BytesIO(base64.b64decode(made.content[0].data)))
    second = Image.open(io.BytesIO(base64.b64decode(edited.content[0].data)))
    wanted = diptych.load("toy/iomm", device="cpu").generate(PROMPT, seed=[3])[0]
    ovis = diptych.load("toy/ovis-u1", device="cpu")
    assert np.abs(levels(first) - levels(wanted)).max() <= 1
    assert np.abs(levels(second) - levels(ovis.edit(first, "make the background navy", seed=[4])[0])).max() <= 1
    assert answer.content[0].text == ovis.ask(first, "what color is the circle?")
    assert wrong.is_error
    assert "base64" in wrong.content[0].text
