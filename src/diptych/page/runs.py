"""The tab of runs: their curves, their samples and their reports, read only, from one folder."""

from __future__ import annotations

import asyncio
import html
import secrets
from pathlib import Path
from typing import Any

import gradio as gr

from diptych.page.events import Updates, spoken
from diptych.page.shelf import note
from diptych.reports import curves
from diptych.serving.errors import bad

MAX_RUNS = 500
MAX_SAMPLES = 24
REPORT_BYTES = 32 << 20
_drawing = asyncio.Lock()
"""matplotlib draws one figure at a time."""


class RunsTab:
    """Its parts. folder: whose runs are shown; work: where curves are drawn to."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder, self.work = folder, work
        with gr.Row():
            self.choice = gr.Dropdown(
                listed(folder), value=None, label=f"Runs in {folder.name}", info="several are drawn over each other",
                multiselect=True, scale=4, elem_id="runs-choice",
            )  # fmt: skip
            self.refresh = gr.Button("Look again", scale=1, min_width=120)
        self.status = gr.HTML(note(invitation(folder)), elem_id="runs-status")
        self.curves = gr.Image(label="Curves", type="filepath", format="png", interactive=False, visible=False,
                               buttons=["download", "fullscreen"], elem_id="runs-curves")  # fmt: skip
        self.samples = gr.Gallery(label="Samples, by step", columns=3, height="auto", object_fit="contain",
                                  format="png", visible=False, elem_id="runs-samples")  # fmt: skip
        self.report = gr.HTML(visible=False, elem_id="runs-report")
        outputs = [self.status, self.curves, self.samples, self.report]
        self.choice.change(
            spoken(self._show, 4), self.choice, outputs, api_visibility="private", show_progress="hidden"
        )  # fmt: skip
        self.refresh.click(lambda: gr.update(choices=listed(self.folder)), None, self.choice, api_visibility="private")

    async def _show(self, chosen: list[str] | None) -> Updates:
        names = list(chosen or [])
        known = await asyncio.to_thread(listed, self.folder)
        for name in names:
            if name not in known:
                raise bad("run", f"{name!r} is not there any more; look again")
        if not names:
            yield note(invitation(self.folder)), *[gr.update(visible=False)] * 3
            return
        folders = {name: self.folder / name for name in names}
        drawn = await self._curves(folders)
        shown: list[tuple[str, str]] = []
        for name, folder in folders.items():
            files = sorted((folder / "samples").glob("*.png"))[-MAX_SAMPLES // len(folders) :]
            shown += [(str(file), file.stem if len(folders) == 1 else f"{name}, {file.stem}") for file in files]
        report = await asyncio.to_thread(framed, next(iter(folders.values()))) if len(names) == 1 else ""
        have = [word for word, thing in (("curves", drawn), ("samples", shown), ("a report", report)) if thing]
        words = f"{', '.join(names)}: {', '.join(have) or 'nothing to show yet'}."
        yield (
            note(words), gr.update(value=drawn, visible=drawn is not None),
            gr.update(value=[(copied(path, self.work), label) for path, label in shown], visible=bool(shown)),
            gr.update(value=report, visible=bool(report)),
        )  # fmt: skip

    async def _curves(self, folders: dict[str, Path]) -> str | None:
        """The picture of the curves, None where no run has any."""
        rows: dict[str, Any] = {}
        for name, folder in folders.items():
            if (folder / "metrics.jsonl").is_file():
                rows[name] = await asyncio.to_thread(curves.read, folder)
        if not rows:
            return None
        path = self.work / f"curves-{secrets.token_hex(8)}.png"
        async with _drawing:
            await asyncio.to_thread(curves.plot, rows, path)
        return str(path)


def invitation(folder: Path) -> str:
    """What is said where no run is chosen."""
    return "Choose a run, or several." if listed(folder) else f"There is no run in {folder.name} yet; see --runs."


def listed(folder: Path) -> list[str]:
    """Names of the runs in a folder and in its folders, the newest first."""
    times: dict[str, float] = {}
    for pattern in ("*", "*/*"):
        for file in ("metrics.jsonl", "report.html"):
            for path in folder.glob(f"{pattern}/{file}"):
                times[str(path.parent.relative_to(folder))] = path.stat().st_mtime
    return sorted(times, key=lambda name: -times[name])[:MAX_RUNS]


def framed(folder: Path) -> str:
    """A run's report in a frame in which no script runs."""
    path = folder / "report.html"
    if not path.is_file() or path.stat().st_size > REPORT_BYTES:
        return ""
    inside = html.escape(path.read_text(encoding="utf-8", errors="replace"), quote=True)
    return f'<iframe title="Report" sandbox="" style="width:100%;height:80vh;border:0" srcdoc="{inside}"></iframe>'


def copied(path: str, work: Path) -> str:
    """A picture's copy in the page's own folder, for only files there are shown."""
    place = work / f"sample-{secrets.token_hex(8)}"
    place.mkdir(parents=True)
    target = place / Path(path).name
    target.write_bytes(Path(path).read_bytes())
    return str(target)
