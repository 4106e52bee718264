"""The tab that compares: two models on the same prompt and seeds, and one model over two settings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import gradio as gr

from diptych.page.drawing import Progress, drawn
from diptych.page.events import Updates, spoken
from diptych.page.forms import asked, choose_model, filled, line
from diptych.page.shelf import Shelf, note, other_settings
from diptych.serving.errors import bad
from diptych.serving.service import DrawCall, Service

MAX_CELLS = 64
PARAMETERS = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "seed": "seed",
    "size": "size",
    "model": "model",
    "prompt": "prompt",
    "negative prompt": "negative_prompt",
    "solver": "solver",
    "timestep shift": "timestep_shift",
}
OF_SAMPLING = ("solver", "timestep_shift")


class CompareTab:
    """Its parts."""

    def __init__(self, service: Service, shelf: Shelf) -> None:
        self.service, self.shelf = service, shelf
        self.prompt = gr.Textbox(label="Prompt", lines=2, max_lines=12, elem_id="compare-prompt")
        with gr.Row():
            self.seeds = line("Seeds", "1-4, 9", value="1-4")
            self.steps = line("Steps", "the models' own")
            self.guidance = line("Text guidance", "the models' own")
        with gr.Tabs():
            with gr.Tab("Two models"):
                with gr.Row():
                    self.one = choose_model(service, "compare-one", "First model", 0)
                    self.two = choose_model(service, "compare-two", "Second model", 1)
                with gr.Row():
                    self.go = gr.Button("Compare", variant="primary", elem_id="compare-go")
                    self.stop = gr.Button("Stop")
                self.status = gr.HTML(note(""), elem_id="compare-status")
                with gr.Row():
                    self.first = gr.Gallery(label="First model", columns=2, height="auto", object_fit="contain",
                                            elem_id="compare-first", format="png")  # fmt: skip
                    self.second = gr.Gallery(label="Second model", columns=2, height="auto", object_fit="contain",
                                             elem_id="compare-second", format="png")  # fmt: skip
            with gr.Tab("Grid"):
                self.model = choose_model(service, "grid-model")
                with gr.Row():
                    self.across = gr.Dropdown(list(PARAMETERS), value="guidance", label="Across", min_width=120)
                    self.columns = gr.Textbox("1, 2, 4", label="Values", max_lines=1, min_width=180,
                                              info="divided by commas; by | where a value has one")  # fmt: skip
                with gr.Row():
                    self.down = gr.Dropdown(list(PARAMETERS), value="steps", label="Down", min_width=120)
                    self.rows = gr.Textbox("4, 8", label="Values", max_lines=1, min_width=180)
                with gr.Row():
                    self.draw = gr.Button("Draw the grid", variant="primary", elem_id="grid-go")
                    self.halt = gr.Button("Stop")
                self.grid_status = gr.HTML(note(""), elem_id="grid-status")
                self.grid = gr.Gallery(label="Grid", columns=3, height="auto", object_fit="contain", format="png",
                                       elem_id="grid-gallery")  # fmt: skip
        self._wire()

    def _wire(self) -> None:
        shared = [self.prompt, self.seeds, self.steps, self.guidance]
        options: dict[str, Any] = {
            "api_visibility": "private",
            "show_progress": "hidden",
            "concurrency_limit": None,
        }
        outputs = [self.status, self.first, self.second]
        run = self.go.click(spoken(self._compare, 3), [*shared, self.one, self.two], outputs, **options)
        self.stop.click(lambda: note("Stopped."), None, self.status, cancels=[run], api_visibility="private")
        chosen = [self.model, self.across, self.columns, self.down, self.rows]
        grid = self.draw.click(spoken(self._grid, 2), [*shared, *chosen], [self.grid_status, self.grid], **options)
        self.halt.click(lambda: note("Stopped."), None, self.grid_status, cancels=[grid], api_visibility="private")

    async def _compare(self, prompt: str, seeds: str, steps: str, guidance: str, first: str, second: str) -> Updates:
        given = plain(steps, guidance)
        numbers = read_seeds(seeds)
        calls = [
            asked(self.service, model, prompt or "", {**given, "seed": seed})
            for model in (first, second)
            for seed in numbers
        ]
        names = [gr.update(label=name, value=[]) for name in (first, second)]
        yield note(f"Drawing {len(calls)} pictures."), *names
        async with aclosing(together(self.service, self.shelf, calls)) as states:
            async for words, cells in states:
                halves = [cells[: len(numbers)], cells[len(numbers) :]]
                labelled = [
                    [(cell.shown[0][0], f"seed {seed}") for cell, seed in zip(half, numbers, strict=True) if cell.shown]
                    for half in halves
                ]
                yield note(words), *labelled

    async def _grid(self, prompt: str, seeds: str, steps: str, guidance: str, *chosen: str) -> Updates:
        model, across, columns, down, rows = chosen
        if across == down:
            raise bad("grid", "across and down must be two different settings")
        given = {**plain(steps, guidance), "seed": read_seeds(seeds)[0]}
        texts = [[(x, y) for x in split(columns)] for y in split(rows)]
        flat = [pair for row in texts for pair in row]
        if len(flat) > MAX_CELLS:
            raise bad("grid", f"at most {MAX_CELLS} pictures, not {len(flat)}")
        calls = [self._cell(model, prompt or "", given, {across: x, down: y}) for x, y in flat]
        width = len(texts[0])
        yield note(f"Drawing {len(calls)} pictures."), gr.update(value=[], columns=width)
        async with aclosing(together(self.service, self.shelf, calls)) as states:
            async for words, cells in states:
                shown = [
                    (cell.shown[0][0], f"{across} {x}, {down} {y}")
                    for cell, (x, y) in zip(cells, flat, strict=True)
                    if cell.shown
                ]
                yield note(words), gr.update(value=shown, columns=width)

    def _cell(self, model: str, prompt: str, given: dict[str, Any], changed: dict[str, str]) -> DrawCall:
        """The drawing of one place of the grid."""
        fields: dict[str, Any] = {"model": model, "prompt": prompt, **given}
        sampling: dict[str, Any] = {}
        for label, text in changed.items():
            if label not in PARAMETERS:
                raise bad("grid", f"there is no setting {label!r}")
            name = PARAMETERS[label]
            if name in OF_SAMPLING:
                sampling |= other_settings(f"{name}={text}")
            else:
                fields[name] = text
        more = {"sampling": sampling} if sampling else {}
        return asked(self.service, fields.pop("model"), fields.pop("prompt"), {**fields, **more})


async def together(service: Service, shelf: Shelf, calls: list[DrawCall]) -> AsyncGenerator[tuple[str, list[Progress]]]:
    """Many drawings at a time, which share steps: words, and the state of each, whenever one goes on.

    Raises:
        The first error of any, and the others are cancelled.
    """
    cells = [Progress("") for _ in calls]
    changed = asyncio.Event()

    async def follow(place: int, call: DrawCall) -> None:
        async with aclosing(drawn(service, shelf, call)) as states:
            async for now in states:
                cells[place] = now
                changed.set()

    tasks = [asyncio.ensure_future(follow(place, call)) for place, call in enumerate(calls)]
    everything = asyncio.gather(*tasks)
    try:
        while not everything.done():
            waiting = asyncio.ensure_future(changed.wait())
            await asyncio.wait({everything, waiting}, timeout=1, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if changed.is_set() and not everything.done():
                changed.clear()
                done = sum(bool(cell.paths) for cell in cells)
                yield f"{done} of {len(cells)} pictures.", cells
                await asyncio.sleep(0.1)  # many estimates are shown at once
        await everything
        yield f"{len(cells)} pictures.", cells
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def plain(steps: str, guidance: str) -> dict[str, Any]:
    return filled({"num_inference_steps": steps, "guidance_scale": guidance})


def read_seeds(text: str) -> list[int]:
    """Whole numbers and spans of them: "1-4, 9" gives 1, 2, 3, 4, 9."""
    seeds: list[int] = []
    for piece in (piece.strip() for piece in (text or "").split(",")):
        first, dash, last = piece.partition("-")
        if not first.strip().isdigit() or (dash and not last.strip().isdigit()):
            raise bad("seeds", f"whole numbers as in 1-4, 9; {piece!r} is none")
        span = range(int(first), int(last if dash else first) + 1)
        if len(span) > MAX_CELLS or len(seeds) + len(span) > MAX_CELLS // 2:
            raise bad("seeds", f"at most {MAX_CELLS // 2}")
        seeds += span
    if not seeds:
        raise bad("seeds", "give at least one")
    return seeds


def split(text: str) -> list[str]:
    """Values that were typed into one line."""
    pieces = [piece.strip() for piece in (text or "").split("|" if "|" in (text or "") else ",")]
    given = [piece for piece in pieces if piece]
    if not given:
        raise bad("grid", "give at least one value across and one down")
    return given
