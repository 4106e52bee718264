"""What an MLLM of the toy world says would be where after an edit: does it find the object that is named?

    python benchmarks/edit_lists.py MODEL ... [--edits 120] [--kinds recolour remove replace] [--output FILE]

The edits are those of a stream of their own. A model sees the picture before and is asked for the list of what would be
where after it, greedily, as toy/omnigen2 and toy/ovis-u1 condition their decoders on. Right: colour and shape of each
cell that the edit changes; whole: the whole list, background and all. By the number of objects before the edit, and in
all. The last line, and FILE, are JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from diptych.core.sample import IMAGE_PLACEHOLDER, Message
from diptych.recipes.load import load
from diptych.toyworld.edits import EDIT_KINDS, Edit, EditKind, random_edit
from diptych.toyworld.language import LIST, listing, slots
from diptych.toyworld.render import render
from diptych.toyworld.scene import CELLS, generator
from measure import machine

SEED = 424_242
"""Of the edits, which are no task's."""
BATCH = 24
TOKENS = 96


def told(answer: str) -> dict[str, str]:
    """Contents by slot, of a list; a slot that is told twice has what was said last."""
    found: dict[str, str] = {}
    for entry in answer.strip().rstrip(".").split(","):
        for slot in slots():
            if entry.strip().startswith(f"{slot} "):
                found[slot] = entry.strip().removeprefix(f"{slot} ")
    return found


def verdict(answer: str, edit: Edit) -> tuple[bool, bool]:
    """Whether the cells that the edit changes are told right, and whether all is."""
    said, true = told(answer), told(listing(edit.target, range(len(slots()))))
    changed = [f"{CELLS[cell]} {what}" for cell in edit.cells for what in ("color", "shape")] or ["background"]
    return all(said.get(slot) == true[slot] for slot in changed), said == true


def answers(model: str, edits: list[Edit]) -> list[str]:
    """The list after each edit, as the model tells it."""
    system = load(model).system
    said: list[str] = []
    for at in range(0, len(edits), BATCH):
        part = edits[at : at + BATCH]
        asked = [[Message(role="user", text=f"{IMAGE_PLACEHOLDER}\n{edit.instruction}. {LIST}")] for edit in part]
        said += system.generate_text(asked, [[render(edit.source)] for edit in part], max_new_tokens=TOKENS)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--edits", type=int, default=120, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=EDIT_KINDS, default=["recolour", "remove", "replace"])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    kinds: list[EditKind] = given.kinds
    rows: list[dict[str, str | int | float]] = []
    print("| model | edit | objects | edits | right | whole |\n|---|---|---|---|---|---|")
    for model in given.models:
        for kind in kinds:
            edits = [random_edit(generator(SEED, kind, index), kind) for index in range(given.edits)]
            verdicts = [verdict(answer, edit) for answer, edit in zip(answers(model, edits), edits, strict=True)]
            for count in (*sorted({len(edit.source.objects) for edit in edits}), None):
                chosen = [v for v, e in zip(verdicts, edits, strict=True) if count in (None, len(e.source.objects))]
                right, whole = (sum(v[at] for v in chosen) / len(chosen) for at in (0, 1))
                row = {"model": model, "edit": kind, "objects": count or "all", "edits": len(chosen)}
                rows.append({**row, "right": round(right, 3), "whole": round(whole, 3)})
                print(f"| {' | '.join(map(str, row.values()))} | {right:.2f} | {whole:.2f} |", flush=True)
    result = json.dumps({"benchmark": "edit_lists", "edits": given.edits, "rows": rows, **machine("cpu")})
    print(result)
    if given.output:
        given.output.write_text(f"{result}\n")


if __name__ == "__main__":
    main()
