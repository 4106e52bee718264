"""The documentation as a site, and its notebooks."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import diptych

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a link or heading that is missing, or a page in no menu, ends the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return folder


def test_each_page_is_there(site: Path) -> None:
    for page in DOCS.glob("*.md"):
        assert (site / f"{page.stem}.html").is_file(), page.name
    for page in ("index", "contributing", "changelog", "comfyui", "notebooks/use"):
        assert (site / f"{page}.html").is_file(), page


def test_public_names_are_described(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    places = {f"{diptych._PLACES[name]}.{name}" for name in diptych.__all__}
    assert places <= set(re.findall(r'id="(diptych[\w.]+)"', text))
    assert "Images for one prompt or several" in text, "the docstrings of methods"


def test_links_lead_to_files(site: Path) -> None:
    """What is written for the repository leads somewhere on the site too."""
    for page in site.rglob("*.html"):
        for target in re.findall(r'<a [^>]*href="(?![a-z]+:)([^"#?]+)', page.read_text(encoding="utf-8")):
            if page.name != "404.html":
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_no_page_asks_another_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        loads = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]+)"', page.read_text(encoding="utf-8"))
        assert not [target for target in loads if not target.startswith("https://diptych")], page.name


def test_notebooks_hold_no_path_of_a_machine() -> None:
    for path in (DOCS / "notebooks").glob("*.ipynb"):
        assert not re.search(r"/(home|root|work|tmp|Users)/", path.read_text(encoding="utf-8")), path.name


def test_the_menu_names_every_notebook() -> None:
    menu = yaml.dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert all(f"notebooks/{name}.ipynb" in menu for name in loaded("run_notebooks").names())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compare", "use", "your_pictures"])
def test_a_notebook_runs(name: str) -> None:
    assert name in loaded("run_notebooks").names()
    cells = [cell for cell in loaded("run_notebooks").run(name).cells if cell.cell_type == "code"]
    assert all(output.output_type != "error" for cell in cells for output in cell.outputs)
    assert all("exit code" not in str(output) for cell in cells for output in cell.outputs)
    assert any(output.get("data", {}).get("image/png") for cell in cells for output in cell.outputs)
