"""The page as an application of the server, with a folder of its own that goes when the server ends."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import gradio as gr
from fastapi import FastAPI

from diptych.page.gate import PATH, Gate
from diptych.page.layout import ICON, PHONE, STYLE, make_page, theme
from diptych.serving.app import Mount
from diptych.serving.service import Service


def page_mount(service: Service, runs: Path) -> Mount:
    """The page under `PATH`, with the engine and the key of the API.

    Args:
        runs: the folder whose runs are shown.
    """
    folder = Path(tempfile.mkdtemp(prefix="diptych-page-"))
    # Where Gradio keeps what is uploaded and shown; nothing is reported to its makers.
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "gradio")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page = make_page(service, folder, runs)
    outer = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    gr.mount_gradio_app(
        outer, page, PATH, footer_links=[], run_history=False, show_error=False, ssr_mode=False, pwa=False,
        mcp_server=False, enable_monitoring=False, max_file_size=service.options.body, theme=theme(), css=STYLE,
        head=ICON + PHONE,
    )  # fmt: skip

    @asynccontextmanager
    async def life() -> AsyncIterator[None]:
        try:
            async with outer.router.lifespan_context(outer):
                yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    return Mount(PATH, Gate(outer, service.options.key), life, below=True, stop=page.app.stop_event.set)
