"""The documentation as a site, and its notebooks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import diptych

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
WORDS = {"compare": "mix: 0.", "use": "navy", "your_pictures": "no fault: the run can begin"}
"""What a cell of each notebook prints."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a link or heading that is missing, or a page in no menu, ends the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.mark.slow
def test_each_page_is_there(site: Path) -> None:
    for page in DOCS.glob("*.md"):
        assert (site / f"{page.stem}.html").is_file(), page.name
    for page in ("index", "contributing", "changelog", "comfyui", "notebooks/use"):
        assert (site / f"{page}.html").is_file(), page


@pytest.mark.slow
def test_public_names_are_described(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    places = {f"{diptych._PLACES[name]}.{name}" for name in diptych.__all__}
    assert places <= set(re.findall(r'id="(diptych[\w.]+)"', text))
    assert "Images for one prompt or several" in text, "the docstrings of methods"


@pytest.mark.slow
def test_links_lead_to_files(site: Path) -> None:
    """What is written for the repository leads somewhere on the site too."""
    for page in site.rglob("*.html"):
        for target in re.findall(r'<a [^>]*href="(?![a-z]+:)([^"#?]+)', page.read_text(encoding="utf-8")):
            if page.name != "404.html":
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.slow
def test_no_page_asks_another_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        loads = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]+)"', page.read_text(encoding="utf-8"))
        assert not [target for target in loads if not target.startswith("https://diptych")], page.name


def test_notebooks_hold_no_path_of_a_machine() -> None:
    for path in (DOCS / "notebooks").glob("*.ipynb"):
        assert not re.search(r"/(home|root|work|tmp|Users)/", path.read_text(encoding="utf-8")), path.name


def test_the_menu_names_every_notebook() -> None:
    menu = yaml.dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    notebooks = {path.stem for path in (DOCS / "notebooks").glob("*.ipynb")}
    assert notebooks == set(WORDS)
    assert all(f"notebooks/{name}.ipynb" in menu for name in notebooks)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WORDS))
def test_a_notebook_runs(name: str, tmp_path: Path) -> None:
    """In a process of its own: a kernel's sockets are closed when it likes, and warn."""
    command = [sys.executable, str(DOCS / "run_notebooks.py"), "--output", str(tmp_path), name]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    made = json.loads((tmp_path / f"{name}.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in made["cells"] for output in cell.get("outputs", [])]
    assert all(output["output_type"] != "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(line for output in outputs for line in output.get("text", []))
    assert WORDS[name] in text
