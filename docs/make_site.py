"""Hook of MkDocs: pages that lie outside docs/ become pages of the site, and links into the code become plain names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "integrations/comfyui/README.md": "comfyui.md",
}
"""Files outside docs/, and the names of their pages."""

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, files: Files, **_: Any) -> str:
    """Links as they lead from the page's place on the site; a file that is no page is named without a link."""
    place = page.file.src_uri
    origin = next((ROOT / source for source, name in PAGES.items() if name == place), ROOT / "docs" / place)

    def moved(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = (origin.parent / target).resolve()
        if not path.is_relative_to(ROOT):
            return link[0]
        inner = path.relative_to(ROOT).as_posix()
        name = PAGES.get(inner, inner.removeprefix("docs/"))
        if files.get_file_from_path(name) is None:
            return text
        return f"[{text}]({'../' * place.count('/')}{name}{anchor})"

    markdown = _LINK.sub(moved, markdown)
    return re.sub(r"\]\(docs/images/", "](images/", markdown) if place in PAGES.values() else markdown


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Links of notebooks lead to pages, where in the repository they lead to their sources."""
    return re.sub(r'href="(\.\./[\w-]+)\.md', r'href="\1.html', html) if page.file.src_uri.endswith(".ipynb") else html
