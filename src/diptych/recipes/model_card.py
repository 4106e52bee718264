"""The card of a model: Markdown with the metadata that the hub reads."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diptych.core.errors import UserError
from diptych.core.reading import read_text, read_yaml
from diptych.inference.sampling import Sampling
from diptych.recipes.names import shipped

CARD = "README.md"
UNKNOWN = "Not stated."


def model_card(
    name: str,
    kind: str,
    tasks: tuple[str, ...],
    origins: Mapping[str, Mapping[str, Any]],
    sampling: Sampling,
    data: str = "",
    scores: Mapping[str, float] | None = None,
) -> str:
    """The card of the model that was loaded as `name`.

    What is not given is taken from the run that the name stands for (its start, its sources, its prompts), or from
    the card that lies in the folder already.

    Args:
        origins: what its parts are of, by part (`System.origins`). data: what it learned from. scores: by benchmark.

    Raises:
        UserError: a score that is no number.
    """
    recipe, old = run_of(name), sections(name)
    named = list(
        dict.fromkeys([*base_names(recipe), *(str(row["weights"]) for row in origins.values() if weights(row))])
    )
    bases = [base.partition("@")[0] for base in named if is_hub_id(base)]
    shown = {key: value for key, value in dataclasses.asdict(sampling).items() if value not in ("", {})}
    prompts = recipe.get("sample_prompts") or ["a red circle left of a blue square"]
    head = ["---", "library_name: diptych", "pipeline_tag: any-to-any"]
    if bases:
        head += ["base_model:", *(f"- {base}" for base in dict.fromkeys(bases))]
    body = {
        "Base": "\n".join(f"- {base if is_hub_id(base) or base in shipped() else Path(base).name}" for base in named),
        "Data": data or "\n".join(sources(recipe)) or old.get("Data", ""),
        "Scores": score_lines(scores) if scores else old.get("Scores", ""),
        "Sampling": "\n".join(f"- `{key}`: {value}" for key, value in shown.items()),
    }
    return "\n".join(
        [
            *head,
            *("tags:", "- diptych", f"- {kind}", "---", ""),
            *(f"# {Path(name).name if Path(name).is_absolute() else name}", ""),
            *(f"A unified multimodal model of kind `{kind}`: {', '.join(tasks)}.", ""),
            *("```python", "import diptych", ""),
            'model = diptych.load("OWNER/NAME")  # this repository, or the folder',
            *(f"images = model.generate({str(prompts[0])!r})", "```", ""),
            *(line for title, text in body.items() for line in (f"## {title}", "", text or UNKNOWN, "")),
        ]
    )


def weights(origin: object) -> str | None:
    """The MODEL whose weights a part has; None for those of no other."""
    return origin.get("weights") if isinstance(origin, Mapping) else None


def is_hub_id(name: str) -> bool:
    """Whether a name is of the hub: neither a folder here nor a shipped model."""
    return name.count("/") == 1 and not name.startswith(("toy/", ".", "/", "~")) and not Path(name).exists()


def run_of(name: str) -> dict[str, Any]:
    """The recipe of the run whose folder, `model` or checkpoint a MODEL is; empty for others."""
    place = Path(name).expanduser()
    run = {"model": place.parent}.get(place.name, place)
    run = place.parent.parent if place.parent.name == "checkpoints" else run
    recipe = read_yaml(run / "recipe.yaml") if (run / "recipe.yaml").is_file() else None
    return recipe if isinstance(recipe, dict) else {}


def base_names(recipe: Mapping[str, Any]) -> list[str]:
    """What a run started from."""
    start = recipe.get("start")
    return [start] if isinstance(start, str) else []


def sources(recipe: Mapping[str, Any]) -> list[str]:
    """What a run learned from, stage by stage, without the places of this machine."""
    lines: list[str] = []
    for stage, spec in (recipe.get("stages") or {}).items():
        for source, values in ((spec.get("data") or {}).get("sources") or {}).items():
            path = values.get("path")
            place = f" `{Path(path).name}`" if isinstance(path, str) else ""
            lines.append(f"- {source} (stage {stage}, {values.get('task')}): {values.get('kind')}{place}")
    return lines


def score_lines(scores: Mapping[str, float]) -> str:
    """Scores as a list; UserError for what is no number."""
    for name, value in scores.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"scores: {name} must be a number, not {value!r}")
    return "\n".join(f"- {name}: {value:g}" for name, value in scores.items())


def sections(name: str) -> dict[str, str]:
    """The stated sections of the card in a model's folder, by title."""
    file = Path(name).expanduser() / CARD
    if not file.is_file() or not (text := read_text(file)).startswith("---\nlibrary_name: diptych\n"):
        return {}
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return {
        title: said.strip() for title, said in zip(parts[1::2], parts[2::2], strict=True) if said.strip() != UNKNOWN
    }
