"""The tab that changes pictures: one, of which a part may be painted over, or several that the words refer to."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from diptych.data.imaging import as_image
from diptych.page.drawing import drawn
from diptych.page.events import Updates, spoken
from diptych.page.forms import asked, choose_model, knobs, values
from diptych.page.shelf import Shelf, described, note, read_file
from diptych.serving.errors import bad
from diptych.serving.images_api import MOST_IMAGES
from diptych.serving.service import Service


class EditTab:
    """Its parts. `editor` holds the picture and what was painted on it."""

    def __init__(self, service: Service, shelf: Shelf) -> None:
        self.service, self.shelf = service, shelf
        editing = [place for place, name in enumerate(service.models.listed()) if edits(service, name)]
        with gr.Row():
            with gr.Column(min_width=320):
                gr.Markdown("Choose a picture. Paint over what is to change; where nothing is painted, all of it may.")
                self.editor = gr.ImageEditor(
                    label="Picture", type="pil", format="png",
                    sources=["upload", "clipboard"], transforms=[], layers=False, height=420, canvas_size=(512, 512),
                    brush=gr.Brush(default_size=brush_size(service), colors=[("#e11d48", 0.6)], color_mode="fixed"),
                    buttons=[], elem_id="edit-picture",
                )  # fmt: skip
                self.instruction = gr.Textbox(label="Instruction", lines=2, max_lines=12, elem_id="edit-instruction",
                                              placeholder="make the background navy; Shift+Enter edits")  # fmt: skip
                self.model = choose_model(service, "edit-model", place=editing[0] if editing else 0)
                with gr.Accordion("Further pictures that the instruction refers to", open=False):
                    self.more = gr.Gallery(label="Second, third, ...", type="filepath", columns=4, height=140,
                                           format="png", interactive=True, sources=["upload", "clipboard"],
                                           elem_id="edit-more")  # fmt: skip
                self.knobs = knobs(edits=True)
                with gr.Row():
                    self.go = gr.Button("Edit", variant="primary", elem_id="edit-go", min_width=120)
                    self.stop = gr.Button("Stop", min_width=120)
            with gr.Column(min_width=320):
                self.status = gr.HTML(note(""), elem_id="edit-status")
                self.slider = gr.ImageSlider(label="Before and after", type="filepath", format="png", max_height=420,
                                             buttons=["fullscreen"], interactive=False,
                                             elem_id="edit-slider")  # fmt: skip
                self.gallery = gr.Gallery(label="Pictures", columns=2, height="auto", object_fit="contain",
                                          format="png", buttons=["download", "fullscreen"],
                                          elem_id="edit-gallery")  # fmt: skip
                self.thoughts = gr.Textbox(label="What the model wrote first", visible=False, lines=2, max_lines=12)
                self.again = gr.Button("Edit the result further", interactive=False)
                with gr.Accordion("Settings of the picture", open=False):
                    self.about = gr.JSON(show_label=False)
        self.before = gr.State("")
        self.paths = gr.State([])
        self.chosen = gr.State("")
        self._wire()

    def _wire(self) -> None:
        inputs = [self.editor, self.instruction, self.model, self.more, *self.knobs.inputs()]
        outputs = [self.status, self.slider, self.gallery, self.thoughts, self.before, self.paths, self.chosen]
        outputs += [self.about, self.again]
        run = gr.on(
            [self.go.click, self.instruction.submit], spoken(self._edit, len(outputs)), inputs, outputs,
            api_visibility="private", show_progress="hidden", concurrency_limit=None,
        )  # fmt: skip
        self.stop.click(lambda: note("Stopped."), None, self.status, cancels=[run], api_visibility="private")
        self.gallery.select(
            self._choose, [self.before, self.paths], [self.chosen, self.about, self.slider],
            api_visibility="private", show_progress="hidden",
        )  # fmt: skip
        self.again.click(lambda path: path or gr.skip(), self.chosen, self.editor, api_visibility="private")

    async def _edit(self, drawn_on: Any, instruction: str, model: str, more: Any, *given: Any) -> Updates:
        first = background(drawn_on)
        others = [read_file(entry[0]) for entry in more or []]
        if len(others) >= MOST_IMAGES:
            raise bad("pictures", f"at most {MOST_IMAGES}, not {len(others) + 1}")
        mask = painted(drawn_on.get("layers") or [], first)
        call = asked(
            self.service, model, instruction or "", values(*given), images=[first, *others], mask=mask
        )  # fmt: skip
        before = self.shelf.keep(first, {})
        async with aclosing(drawn(self.service, self.shelf, call)) as states:
            async for now in states:
                slider = (before, now.shown[0][0]) if now.shown else gr.skip()
                thoughts = gr.update(value=now.thoughts, visible=bool(now.thoughts))
                made = now.paths[0] if now.paths else ""
                about = described(made) if made else None
                again = gr.update(interactive=bool(made))
                yield note(now.words), slider, now.shown, thoughts, before, now.paths, made, about, again

    def _choose(self, before: str, paths: list[str], event: gr.SelectData) -> tuple[Any, ...]:
        """The result that was clicked, beside the picture before."""
        place = event.index
        if not isinstance(place, int) or place >= len(paths):
            return "", None, gr.skip()
        return paths[place], described(paths[place]), (before, paths[place])


def background(drawn_on: Any) -> Image.Image:
    """The picture of the editor, read as every other: what is transparent becomes white (`data.imaging.as_image`).

    Raises:
        ApiError: none was chosen.
    """
    if not drawn_on or drawn_on.get("background") is None:
        raise bad("picture", "choose one first", "missing_parameter")
    return as_image(drawn_on["background"], "picture")


def painted(layers: list[Image.Image], picture: Image.Image) -> np.ndarray | None:
    """What a mask keeps, (H, W) in 0..1: 0 where any layer was painted on; None where nothing was."""
    changed = np.zeros((picture.height, picture.width), dtype=bool)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A")
        if alpha.size != picture.size:
            alpha = alpha.resize(picture.size, Image.Resampling.NEAREST)
        changed |= np.asarray(alpha) > 0
    return None if not changed.any() else 1 - changed.astype(np.float32)


def edits(service: Service, name: str) -> bool:
    """Whether a loaded model can edit pictures."""
    engine = service.models.loaded_engine(name)
    return engine is not None and "edit" in engine.system.tasks


def brush_size(service: Service) -> int:
    """Radius of the brush at first, in pixels: a twelfth of the pictures that the first model makes."""
    engine = service.models.loaded_engine(service.models.names[0])
    return 24 if engine is None else max(2, min(engine.sampling.size) // 12)
