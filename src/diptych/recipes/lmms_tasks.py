"""Tasks of lmms-eval that want pictures for replies: they would score a text 0.0, and so they are refused by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from diptych.core.errors import UserError

DRAWN = ("imgedit", "gedit", "kris_bench", "wise", "babyvision_gen", "structeditbench", "ueval", "geneval", "dpg")
"""Names with which such tasks begin: those of lmms-eval 0.7.3, and of benchmarks that it may take up."""
_JSON = re.compile(r"json\.loads\(|ast\.literal_eval\(")
_IMAGES = re.compile(r"""(?:\.get\(\s*|\[)["'](?:images|image_paths|generated_images?)["']""")


def refuse_drawing(task: str, scorer: Callable[..., Any] | None) -> None:
    """Raises UserError for a task whose replies are pictures.

    Args:
        task: its name in lmms-eval. scorer: its `process_results`, whose module is read: lmms-eval's own drawing tasks
            take a reply for JSON and open the files that it names under "images".
    """
    if task.lower().startswith(DRAWN) or _opens_pictures(scorer):
        raise UserError(
            f"lmms-eval task {task}: its replies are pictures, and diptych models answer in text there, which would "
            "score 0.0; use diptych eval (geneval, dpg, wise_legacy, imgedit, gedit)"
        )


def _opens_pictures(scorer: Callable[..., Any] | None) -> bool:
    """Whether a scorer reads a reply as JSON that names pictures."""
    if scorer is None:
        return False
    try:
        source = inspect.getsource(inspect.unwrap(scorer))
    except (OSError, TypeError):
        return False
    return bool(_JSON.search(source) and _IMAGES.search(source))
