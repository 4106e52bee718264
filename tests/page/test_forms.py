"""What is typed into the page becomes the fields of the API, and what is wrong is said in words."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")

from diptych import page
from diptych.inference.provenance import png_info
from diptych.page.compare import read_seeds, split
from diptych.page.edit import background, painted
from diptych.page.forms import values
from diptych.page.gate import names_address
from diptych.page.runs import framed, listed
from diptych.page.shelf import KEPT, Shelf, note, other_settings, settings_in, typed
from diptych.serving.errors import ApiError


def test_empty_fields_are_the_models_own() -> None:
    assert values("auto", 1, "", "", "", "the model's own", "", "") == {"size": "auto", "n": 1}
    given = values("64x32", 2.0, " 8 ", "2.5", "1.5", "7", "off", "a cross", "solver=heun\n\ncfg_range=[0, 0.5]")
    assert given == {
        "size": "64x32", "n": 2, "num_inference_steps": "8", "guidance_scale": "2.5", "image_guidance_scale": "1.5",
        "seed": "7", "think": False, "negative_prompt": "a cross",
        "sampling": {"solver": "heun", "cfg_range": [0, 0.5]},
    }  # fmt: skip


def test_other_settings_are_read_as_they_are_written() -> None:
    settings = {"solver": "heun", "cfg_range": [0.0, 0.5], "guidance": {"kind": "chain"}, "cache": "off"}
    assert other_settings(typed(settings)) == settings
    for text in ("heun", "=1", "a={"):
        with pytest.raises(ApiError, match="other settings"):
            other_settings(text)


def test_seeds_and_values_in_a_line() -> None:
    assert read_seeds("1-3, 9") == [1, 2, 3, 9]
    assert split("1, 2 ,4") == ["1", "2", "4"]
    assert split("red, big | blue") == ["red, big", "blue"]
    for text in ("", "a", "1-", "1-1000000000000", "3-1"):
        with pytest.raises(ApiError, match="seeds"):
            read_seeds(text)


def test_a_mask_keeps_what_was_not_painted() -> None:
    picture, layer = Image.new("RGB", (8, 4)), Image.new("RGBA", (8, 4))
    assert painted([layer], picture) is None
    layer.paste((255, 0, 0, 100), (0, 0, 2, 4))
    mask = painted([layer.resize((16, 8), Image.Resampling.NEAREST)], picture)
    assert mask is not None
    assert np.array_equal(mask, np.repeat([[0, 0, 1, 1, 1, 1, 1, 1]], 4, axis=0))


def test_what_the_editor_shows_as_transparent_is_white() -> None:
    """Gradio's editor gives RGBA, and `convert("RGB")` would show the colour that transparency hides."""
    cut_out = Image.new("RGBA", (4, 2), (10, 200, 30, 0))
    assert background({"background": cut_out}).getpixel((0, 0)) == (255, 255, 255)
    for empty in (None, {"background": None}):
        with pytest.raises(ApiError, match="choose one first"):
            background(empty)


def test_every_picture_of_the_page_is_shown_exactly() -> None:
    """Gradio shows and saves lossy WebP unless it is told another format."""
    shown = [
        call
        for path in Path(page.__file__).parent.glob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) in ("gr.Image", "gr.Gallery", "gr.ImageEditor", "gr.ImageSlider")
    ]
    assert len(shown) >= 6
    for call in shown:
        assert "format='png'" in [ast.unparse(keyword) for keyword in call.keywords], ast.unparse(call)


def test_the_shelf_keeps_settings_and_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(tmp_path)
    about = {"prompt": "../../etc <b>", "seed": "3", "model": "m", "settings": "{}", "software": "diptych 1"}
    path = Path(shelf.keep(Image.new("RGB", (4, 4)), about))
    assert path.name == "etc-b-3.png"
    assert path.is_relative_to(tmp_path)
    assert settings_in(str(path))["prompt"] == about["prompt"]
    monkeypatch.setattr("diptych.page.shelf.KEPT", 2)
    for _ in range(3):
        shelf.keep(Image.new("RGB", (4, 4)), about)
    assert not path.exists()
    assert len(list(tmp_path.rglob("*.png"))) == 2
    assert KEPT > 100


def test_a_picture_without_settings_says_so(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=png_info({"settings": "{", "software": "diptych 1"}))
    with pytest.raises(ApiError, match="carries no settings"):
        settings_in(str(tmp_path / "a.png"))
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(ApiError, match="cannot be read"):
        settings_in(str(tmp_path / "b.png"))


def test_reports_are_framed_without_scripts(runs: Path) -> None:
    assert listed(runs) == ["first"]
    assert 'sandbox=""' in framed(runs / "first")
    assert "<script" not in framed(runs / "first")
    assert note("<script>") == '<p role="status" class="note">&lt;script&gt;</p>'


def test_addresses_anywhere_in_an_event() -> None:
    assert names_address({"data": [{"a": [{"path": "https://x"}]}]})
    assert not names_address({"data": ["https://x", {"path": "/tmp/x"}]})
