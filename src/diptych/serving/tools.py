"""Tools for agents over the Model Context Protocol (MCP), at `/mcp`: list models, make, edit and describe pictures.

Pictures go in as base64 or data URLs, never as paths or addresses, and come out as image content.
"""

from __future__ import annotations

import asyncio
from importlib.metadata import version

from mcp.server import MCPServer
from mcp.server.mcpserver import Image
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from PIL.Image import Image as Picture

from diptych.core.errors import UserError
from diptych.core.sample import IMAGE_PLACEHOLDER, Message
from diptych.serving.app import Mount
from diptych.serving.errors import ApiError
from diptych.serving.pictures import DATA_URL, encode, from_base64, from_data_url, read_picture
from diptych.serving.scheduler import Closing, QueueFull
from diptych.serving.service import DrawCall, Service, WriteCall, last

LONGEST_PROMPT = 32_000


def tools_mount(service: Service, host: str) -> Mount:
    """The tools as an application under `/mcp`.

    Args:
        host: that the server listens on; where it is this machine alone, other Host headers are refused.
    """
    server = MCPServer("diptych", version=version("diptych"), instructions="Make, edit and describe pictures.")

    @server.tool()
    async def list_models() -> list[str]:
        """Names of the models that are served."""
        return service.models.listed()

    @server.tool()
    async def generate_image(prompt: str, model: str = "", seed: int = 0, steps: int = 0) -> Image:
        """A picture of what the prompt says. model: the first when empty. steps: the model's own when 0."""
        options = {"steps": steps} if steps else {}
        return await drawn(service, DrawCall(model=named(service, model), prompt=prompt, seed=seed, options=options))

    @server.tool()
    async def edit_image(image: str, instruction: str, model: str = "", seed: int = 0, steps: int = 0) -> Image:
        """A picture changed as the instruction says. image: base64 of its file, or a data URL."""
        options = {"steps": steps} if steps else {}
        picture = await asyncio.to_thread(read, image)
        call = DrawCall(model=named(service, model), prompt=instruction, images=[picture], seed=seed, options=options)
        return await drawn(service, call)

    @server.tool()
    async def ask_about_image(image: str, question: str, model: str = "") -> str:
        """The answer to a question about a picture. image: base64 of its file, or a data URL."""
        picture = await asyncio.to_thread(read, image)
        try:
            turn = Message(role="user", text=f"{IMAGE_PLACEHOLDER}\n{question}")
            call = WriteCall(model=named(service, model), messages=[turn], pictures=[picture])
            return (await last(service.write(call))).text
        except (ApiError, UserError, QueueFull, Closing) as error:
            raise ToolError(str(error)) from error

    local = host in ("127.0.0.1", "localhost", "::1")
    names = ["127.0.0.1:*", "localhost:*", "[::1]:*"]
    security = TransportSecuritySettings(enable_dns_rebinding_protection=local, allowed_hosts=names)
    app = server.streamable_http_app(
        streamable_http_path="/mcp", stateless_http=True, json_response=True, transport_security=security,
        max_request_body_size=service.options.body,
    )  # fmt: skip
    return Mount("/mcp", app, server.session_manager.run)


async def drawn(service: Service, call: DrawCall) -> Image:
    """The picture of a call as content, its errors in words."""
    if not call.prompt.strip() or len(call.prompt) > LONGEST_PROMPT:
        raise ToolError(f"the prompt must have from 1 to {LONGEST_PROMPT:,} characters")
    try:
        async for event in service.draw(call):
            if event.kind == "done":
                made = event.value
                data = await asyncio.to_thread(encode, made.images[0][-1], "png", None, made.abouts[0])
                return Image(data=data, format="png")
    except (ApiError, UserError, QueueFull, Closing) as error:
        raise ToolError(str(error)) from error
    raise AssertionError("a job ends with an event")


def named(service: Service, model: str) -> str:
    """A served model's name; the first for none."""
    try:
        return service.models.check(model) if model else service.models.names[0]
    except ApiError as error:
        raise ToolError(str(error)) from error


def read(image: str) -> Picture:
    """The picture that a text stands for."""
    try:
        data = from_data_url(image, "image") if image.startswith(DATA_URL) else from_base64(image, "image")
        return read_picture(data, "image")
    except ApiError as error:
        raise ToolError(str(error)) from error
