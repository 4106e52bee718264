"""The page: its tabs, and what leads from one to another."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from gradio.themes import Default

from diptych.page.chat import ChatTab
from diptych.page.compare import CompareTab
from diptych.page.create import CreateTab
from diptych.page.edit import EditTab
from diptych.page.restore import wire
from diptych.page.runs import RunsTab
from diptych.page.shelf import Shelf
from diptych.serving.service import Service

STYLE = """
.gradio-container { width: 100% !important; max-width: 1280px !important; margin: 0 auto !important; }
.note, .problem { margin: 0; min-height: 1.5em; }
.problem { color: #b91c1c; font-weight: 600; }
.dark .problem { color: #fca5a5; }
.grid-wrap.fixed-height { max-height: none !important; }
#runs-samples .grid-container { grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)) !important; }
#chat-turns img { width: 192px !important; max-width: 100%; height: 192px !important; object-fit: contain !important; }
#chat-turns button[aria-label*="hare"], #chat-turns button[title*="hare"] { display: none; }
footer { display: none !important; }
"""
PHONE = """<style>
@media (max-width: 640px) {
  .gradio-container > .main { padding: 8px 12px !important; }
  .gradio-container [role=tab] { padding: 8px 10px !important; }
}
</style>"""
"""In the page's head, for Gradio puts a prefix before the names of styles that it is given, also of its own outermost
part."""


ICON = (
    '<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns=%22http://www.w3.org/2000/svg%22 viewBox=%220 0 16 16%22%3E'
    "%3Crect width=%227%22 height=%2216%22 rx=%222%22 fill=%22%236366f1%22/%3E"
    '%3Crect x=%229%22 width=%227%22 height=%2216%22 rx=%222%22 fill=%22%23a5b4fc%22/%3E%3C/svg%3E">'
)


def theme() -> Default:
    """Colours, and the fonts of the visitor's own system, so that none is fetched."""
    return Default(
        primary_hue="indigo", neutral_hue="slate", radius_size="md", spacing_size="md",
        font=["system-ui", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    )  # fmt: skip


def make_page(service: Service, folder: Path, runs: Path) -> gr.Blocks:
    """The page. folder: of its own, for pictures. runs: whose runs are shown."""
    shelf = Shelf(folder / "shelf")
    with gr.Blocks(title="Diptych", analytics_enabled=False, delete_cache=(600, 6 * 3600), fill_width=True) as page:
        gr.Markdown("# Diptych")
        with gr.Tabs(selected="create", overflow_behavior="wrap") as tabs:
            with gr.Tab("Create", id="create"):
                create = CreateTab(service, shelf)
            with gr.Tab("Edit", id="edit"):
                edit = EditTab(service, shelf)
            with gr.Tab("Chat", id="chat"):
                chat = ChatTab(service, shelf)
            with gr.Tab("Compare", id="compare"):
                compare = CompareTab(service, shelf)
            with gr.Tab("Runs", id="runs"):
                RunsTab(runs, folder / "shelf")
        create.send.click(
            lambda path: (path or gr.skip(), gr.Tabs(selected="edit")), create.chosen, [edit.editor, tabs],
            api_visibility="private", show_progress="hidden",
        )  # fmt: skip
        wire(service, create, edit, tabs)
        choices = [create.model, edit.model, chat.model, compare.one, compare.two, compare.model]
        page.load(
            lambda: [gr.update(choices=service.models.listed())] * len(choices), None, choices,
            api_visibility="private", show_progress="hidden",
        )  # fmt: skip
    page.queue(max_size=service.scheduler.bounds.queue, default_concurrency_limit=None, api_open=False)
    return page
