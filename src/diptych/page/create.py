"""The tab that makes pictures from words."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import gradio as gr

from diptych.page.drawing import drawn
from diptych.page.events import Updates, spoken
from diptych.page.forms import asked, choose_model, knobs, values
from diptych.page.shelf import Shelf, described, note
from diptych.serving.service import Service


class CreateTab:
    """Its parts; `send` is the button that takes the chosen picture to the tab of edits."""

    def __init__(self, service: Service, shelf: Shelf) -> None:
        self.service, self.shelf = service, shelf
        with gr.Row():
            with gr.Column(min_width=320):
                self.prompt = gr.Textbox(label="Prompt", lines=3, max_lines=12, autofocus=True, elem_id="create-prompt",
                                         placeholder="what the picture shows; Shift+Enter creates")  # fmt: skip
                self.model = choose_model(service, "create-model")
                self.knobs = knobs(edits=False)
                with gr.Row():
                    self.go = gr.Button("Create", variant="primary", elem_id="create-go", min_width=120)
                    self.stop = gr.Button("Stop", elem_id="create-stop", min_width=120)
            with gr.Column(min_width=320):
                self.status = gr.HTML(note(""), elem_id="create-status")
                self.gallery = gr.Gallery(label="Pictures", columns=2, height="auto", object_fit="contain",
                                          format="png", buttons=["download", "fullscreen"],
                                          elem_id="create-gallery")  # fmt: skip
                self.thoughts = gr.Textbox(label="What the model wrote first", visible=False, lines=2, max_lines=12,
                                           elem_id="create-thoughts")  # fmt: skip
                self.send = gr.Button("Send to edit", interactive=False, elem_id="create-send")
                with gr.Accordion("Settings of the picture", open=False):
                    self.about = gr.JSON(show_label=False, elem_id="create-about")
                self.dropped = gr.Image(label="Restore settings: drop a saved picture here", type="filepath",
                                        format="png",
                                        image_mode=None, sources=["upload", "clipboard"], height=140, buttons=[],
                                        elem_id="create-restore")  # fmt: skip
        self.paths = gr.State([])
        self.chosen = gr.State("")
        self._wire()

    def outputs(self) -> list[Any]:
        return [self.status, self.gallery, self.thoughts, self.paths, self.chosen, self.about, self.send]

    def _wire(self) -> None:
        inputs = [self.prompt, self.model, *self.knobs.inputs()]
        outputs = self.outputs()
        run = gr.on(
            [self.go.click, self.prompt.submit], spoken(self._create, len(outputs)), inputs, outputs,
            api_visibility="private", show_progress="hidden", concurrency_limit=None,
        )  # fmt: skip
        self.stop.click(lambda: note("Stopped."), None, self.status, cancels=[run], api_visibility="private")
        self.gallery.select(
            self._choose, self.paths, [self.chosen, self.about], api_visibility="private", show_progress="hidden"
        )

    async def _create(self, prompt: str, model: str, *given: Any) -> Updates:
        call = asked(self.service, model, prompt or "", values(*given))
        async with aclosing(drawn(self.service, self.shelf, call)) as states:
            async for now in states:
                thoughts = gr.update(value=now.thoughts, visible=bool(now.thoughts))
                first = now.paths[0] if now.paths else ""
                about = described(first) if first else None
                send = gr.update(interactive=bool(first))
                yield note(now.words), now.shown, thoughts, now.paths, first, about, send

    def _choose(self, paths: list[str], event: gr.SelectData) -> tuple[str, Any]:
        """The picture that was clicked, and its settings."""
        place = event.index
        if not isinstance(place, int) or place >= len(paths):
            return "", None
        return paths[place], described(paths[place])
