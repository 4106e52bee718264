"""The page as a visitor uses it, in a real browser; DIPTYCH_SCREENSHOTS=docs/images draws its pictures anew."""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import diptych
from diptych.inference.provenance import carried, png_info
from serving_process import Running, wait_until

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PROMPT = "a red circle left of a blue square"
PATIENCE = 90_000
"""Milliseconds."""


@functools.cache
def local(name: str) -> Any:
    """A model without a server, to compare with."""
    return diptych.load(name, device="cpu")


@pytest.fixture(scope="module")
def visit(site: Running, browser: Any) -> Iterator[Any]:
    """One open page for all tests, each of which leaves its tab in order."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(PATIENCE)
    page.addresses = []
    page.on("request", lambda request: page.addresses.append(request.url))
    page.goto(site.address)
    page.wait_for_selector("#create-prompt textarea")
    yield page
    page.close()


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def words(page: Any, status: str, pattern: str) -> str:
    """The status line of a tab once it reads so."""
    line = page.locator(f"#{status} p")
    page.wait_for_function(
        "([id, pattern]) => new RegExp(pattern).test(document.querySelector(`#${id} p`)?.innerText ?? '')",
        arg=[status, pattern],
    )
    return line.inner_text()


def settled(page: Any, selector: str) -> dict[str, float]:
    """Where a part lies once it has lain there for half a second: a tool that opens moves what is beside it."""
    part = page.locator(selector).first
    box = None
    while (now := part.bounding_box()) != box:
        box = now
        page.wait_for_timeout(500)
    return now


def choose(page: Any, part: str, name: str) -> None:
    """Choose from a list."""
    page.click(f"#{part} input")
    page.get_by_role("option", name=name).click()


def pictures(page: Any, gallery: str) -> list[Image.Image]:
    """The files that a gallery shows, as they would be saved."""
    names = page.eval_on_selector_all(f"#{gallery} img", "images => images.map(image => image.src)")
    files = [page.request.get(name).body() for name in dict.fromkeys(names)]
    return [Image.open(io.BytesIO(file)) for file in files]


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def shot(page: Any, name: str, top: int = 0) -> None:
    """A picture for the documentation, where it is asked for; scrolled down by so many pixels."""
    folder = os.environ.get("DIPTYCH_SCREENSHOTS")
    if folder:
        page.mouse.move(0, 0)
        page.evaluate(f"scrollTo(0, {top})")
        page.wait_for_timeout(700)
        Image.open(io.BytesIO(page.screenshot())).save(Path(folder) / f"page_{name}.webp", quality=80, method=6)


def test_create_by_keyboard(visit: Any) -> None:
    visit.fill("#create-prompt textarea", PROMPT)
    visit.get_by_label("Seed").first.fill("7")
    visit.focus("#create-prompt textarea")
    visit.keyboard.press("Shift+Enter")
    words(visit, "create-status", r"estimate")
    words(visit, "create-status", r"1 picture in")
    (made,) = pictures(visit, "create-gallery")
    wanted = local("toy/iomm").generate(PROMPT, seed=[7])[0]
    assert np.abs(levels(made) - levels(wanted)).max() <= 1
    about = carried(made)
    assert (about["prompt"], about["seed"], about["model"]) == (PROMPT, 7, "toy/iomm")
    assert visit.input_value("#create-thoughts textarea") == about["expansion"]
    shot(visit, "create")


def test_a_dropped_picture_restores_its_settings(visit: Any, tmp_path: Path) -> None:
    options = {"steps": 5, "cfg": 2.5, "solver": "heun", "negative": "a green cross", "prompt_expansion": 0}
    there = diptych.connect(visit.url.split("/page")[0], "toy/ovis-u1")
    abouts: list[dict[str, str]] = []
    image = there.generate("three green crosses", seed=3, abouts=abouts, **options)[0]
    image.save(tmp_path / "saved.png", pnginfo=png_info(abouts[0]))
    visit.set_input_files("#create-restore input[type=file]", tmp_path / "saved.png")
    words(visit, "create-status", r"settings of saved\.png are restored")
    visit.click("#create-go")
    words(visit, "create-status", r"1 picture in")
    (made,) = pictures(visit, "create-gallery")
    assert np.abs(levels(made) - levels(image)).max() <= 1
    before, after = abouts[0], carried(made)
    assert {name: after[name] for name in ("prompt", "model")} == {name: before[name] for name in ("prompt", "model")}
    assert after["settings"]["solver"] == "heun"


def test_errors_are_said_in_words(visit: Any, tmp_path: Path) -> None:
    visit.fill("#create-prompt textarea", "")
    visit.click("#create-go")
    assert words(visit, "create-status", "prompt") == "prompt: it is empty"
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    visit.set_input_files("#create-restore input[type=file]", tmp_path / "plain.png")
    words(visit, "create-status", "it carries no settings")


def test_edit_a_sent_picture_with_a_brush_mask(visit: Any) -> None:
    tab(visit, "Create")
    choose(visit, "create-model", "toy/iomm")
    visit.fill("#create-prompt textarea", PROMPT)
    visit.click("#create-go")
    words(visit, "create-status", r"1 picture in")
    (image,) = pictures(visit, "create-gallery")
    visit.click("#create-send")
    visit.wait_for_function("document.querySelector('#edit-picture')?.innerText.includes('1000%')")
    visit.locator("#edit-picture button[aria-label='Brush']").first.click()
    box = settled(visit, "#edit-picture canvas")
    # A stroke through the upper left quarter of what is shown.
    x, y = box["x"] + box["width"] / 2 - 80, box["y"] + box["height"] / 2 - 80
    visit.mouse.move(x, y)
    visit.mouse.down()
    visit.mouse.move(x + 40, y, steps=6)
    visit.mouse.up()
    choose(visit, "edit-model", "toy/ovis-u1")
    visit.fill("#edit-instruction textarea", "make the background navy")
    visit.click("#edit-go")
    words(visit, "edit-status", r"1 picture in")
    (made,) = pictures(visit, "edit-gallery")
    assert made.size == image.size
    changed = (levels(made) != levels(image)).any(axis=2)
    assert changed.any(), "the brush chose nothing"
    assert not changed[:, image.width // 2 + 2 :].any(), "what was not painted stays"
    assert not changed[image.height // 2 + 2 :].any(), "what was not painted stays"
    assert carried(made)["instruction"] == "make the background navy"
    assert visit.locator("#edit-slider img").count() == 2
    shot(visit, "edit")


def test_an_edit_reads_several_pictures(visit: Any, tmp_path: Path) -> None:
    colours = ("red", "navy")
    for colour in colours:
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{colour}.png")
    tab(visit, "Edit")
    visit.locator("#edit-picture button[aria-label='Clear canvas']").first.click()
    visit.set_input_files("#edit-picture input[type=file]", tmp_path / "red.png")
    visit.wait_for_function("document.querySelector('#edit-picture')?.innerText.includes('1000%')")
    visit.get_by_text("Further pictures that the instruction refers to").click()
    visit.set_input_files("#edit-more input[type=file]", tmp_path / "navy.png")
    visit.wait_for_selector("#edit-more img")
    visit.get_by_label("Seed").locator("visible=true").fill("4")
    visit.fill("#edit-instruction textarea", "make it green")
    visit.click("#edit-go")
    visit.wait_for_function("!/navy/.test(document.querySelector('#edit-gallery img')?.src ?? 'navy')")
    words(visit, "edit-status", r"1 picture in")
    (made,) = pictures(visit, "edit-gallery")
    files = [tmp_path / f"{colour}.png" for colour in colours]
    wanted = local("toy/ovis-u1").edit(files, "make it green", seed=[4])[0]
    assert np.abs(levels(made) - levels(wanted)).max() <= 1, "both pictures are read"


def test_chat_with_a_picture_over_turns(visit: Any, tmp_path: Path) -> None:
    image = local("toy/iomm").generate(PROMPT, seed=[7])[0]
    image.save(tmp_path / "circle.png")
    tab(visit, "Chat")
    ovis = local("toy/ovis-u1")
    choose(visit, "chat-model", "toy/ovis-u1")
    visit.set_input_files("#chat-message input[type=file]", tmp_path / "circle.png")
    visit.fill("#chat-message textarea", "describe the image.")
    visit.keyboard.press("Enter")
    words(visit, "chat-status", r"\d+ tokens")
    answer = visit.locator("#chat-turns .bot").last.inner_text()
    assert ovis.ask(image, "describe the image.") in answer
    visit.get_by_label("a picture").check()
    visit.fill("#chat-message textarea", "make the background navy")
    visit.keyboard.press("Enter")
    words(visit, "chat-status", r"1 picture in")
    visit.wait_for_function("document.querySelectorAll('#chat-turns .bot img').length == 1")
    shown = visit.locator("#chat-turns .bot img").first.get_attribute("src")
    made = Image.open(io.BytesIO(visit.request.get(shown).body()))
    assert carried(made)["instruction"] == "make the background navy"
    shot(visit, "chat")


def test_compare_models_and_a_grid(visit: Any) -> None:
    tab(visit, "Compare")
    visit.fill("#compare-prompt textarea", "three green crosses")
    visit.get_by_label("Seeds").fill("1-2")
    visit.get_by_label("Steps").locator("visible=true").fill("6")
    visit.click("#compare-go")
    words(visit, "compare-status", r"^4 pictures\.$")
    for gallery, model in (("compare-first", "toy/iomm"), ("compare-second", "toy/ovis-u1")):
        abouts = [carried(image) for image in pictures(visit, gallery)]
        assert [(about["model"], about["seed"]) for about in abouts] == [(model, 1), (model, 2)]
    shot(visit, "compare")
    tab(visit, "Grid")
    visit.click("#grid-go")
    words(visit, "grid-status", r"^6 pictures\.$")
    abouts = [carried(image)["settings"] for image in pictures(visit, "grid-gallery")]
    assert [(about["steps"], about["cfg"]) for about in abouts] == [(s, g) for s in (4, 8) for g in (1.0, 2.0, 4.0)]
    shot(visit, "grid", 330)


def test_runs_show_curves_samples_and_the_report(visit: Any) -> None:
    tab(visit, "Runs")
    visit.locator("#runs-choice input").click()
    visit.get_by_role("option", name="first").click()
    visit.keyboard.press("Escape")
    assert words(visit, "runs-status", "first: ") == "first: curves, samples, a report."
    visit.wait_for_selector("#runs-curves img")
    assert pictures(visit, "runs-samples")[0].size == (64, 32)
    frame = visit.frame_locator("#runs-report iframe")
    assert frame.locator("h1").inner_text() == "What was learned"
    assert visit.title() == "Diptych", "no script of a report runs"
    shot(visit, "runs")


def test_it_fits_a_phone_and_asks_no_other_server(visit: Any, site: Running) -> None:
    visit.set_viewport_size({"width": 390, "height": 844})
    for name in ("Edit", "Chat", "Compare", "Runs", "Create"):
        tab(visit, name)
        visit.wait_for_timeout(150)
        wide, inner = visit.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= inner, f"{name} is wider than a phone"
    shot(visit, "phone")
    elsewhere = [name for name in visit.addresses if not name.startswith((site.address, "data:", "blob:"))]
    assert not elsewhere


def test_stop_and_leaving_free_the_place(visit: Any, site: Running) -> None:
    def drawing() -> float:
        text = visit.request.get(f"{site.address}/metrics").text()
        return float(re.search(r"^diptych_running (\S+)", text, re.M)[1])  # type: ignore[index]

    visit.set_viewport_size({"width": 1200, "height": 900})
    tab(visit, "Create")
    visit.fill("#create-prompt textarea", PROMPT)
    visit.get_by_text("Settings", exact=True).locator("visible=true").first.click()
    visit.get_by_label("Steps").locator("visible=true").fill("1000")
    visit.click("#create-go")
    wait_until(lambda: drawing() == 1)
    visit.click("#create-stop")
    wait_until(lambda: drawing() == 0)
    visit.click("#create-go")
    wait_until(lambda: drawing() == 1)
    visit.goto("about:blank")
    wait_until(lambda: drawing() == 0)
