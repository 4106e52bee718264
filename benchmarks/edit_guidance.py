"""Edits by text and image guidance: a table to choose a toy system's scales by, apart from toyedit's items.

    python benchmarks/edit_guidance.py [MODEL] [--cfg 2,3,...] [--image-cfg 1,1.5,...] [--edits 180] [--output FILE]

The edits are those of another toy world than toyedit's (seed 123,457), with noise of seed 7, at the model's own number
of steps. Of each pair of scales: the mean of the kinds' shares of edits that were carried out, each kind's, and the
share of untouched pixels that stayed. The last line, and FILE, are JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import torch

from diptych.evaluation.toyedit import SEED as JUDGED
from diptych.recipes.load import load
from diptych.toyworld.editjudge import judge_edit
from diptych.toyworld.edits import EDIT_KINDS, Edit
from diptych.toyworld.samples import ToyWorld
from measure import machine

SEED, NOISE = 123_457, 7
assert SEED != JUDGED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="toy/ovis-u1")
    parser.add_argument("--cfg", default="2,2.5,3,4")
    parser.add_argument("--image-cfg", default="1,1.25,1.5")
    parser.add_argument("--edits", type=int, default=180)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    engine = load(given.model)
    world = ToyWorld(SEED, engine.sampling.size[0])
    samples = [world.sample("edit", index) for index in range(given.edits)]
    edits = [Edit.from_dict(sample.extra["edit"]) for sample in samples]
    places = {kind: [k for k, edit in enumerate(edits) if edit.kind == kind] for kind in EDIT_KINDS}
    places = {kind: found for kind, found in places.items() if found}
    print("| cfg | image_cfg | overall |", *(f"{kind} ({len(k)}) |" for kind, k in places.items()), "preserved |")
    print("|---" * (len(places) + 4) + "|")
    rows: list[dict[str, Any]] = []
    for cfg, image_cfg in product(numbers(given.cfg), numbers(given.image_cfg)):
        pictures = engine.tensors(samples, n=1, seed=NOISE, cfg=cfg, image_cfg=image_cfg)
        verdicts = [judge_edit(picture, edit) for picture, edit in zip(pictures, edits, strict=True)]
        kinds = {kind: statistics.mean(verdicts[k].success for k in found) for kind, found in places.items()}
        row = {"overall": statistics.mean(kinds.values()), **kinds}
        row["preserved"] = statistics.mean(verdict.preserved for verdict in verdicts)
        rows.append({"cfg": cfg, "image_cfg": image_cfg, **row})
        print(f"| {cfg:g} | {image_cfg:g} |", *(f"{value:.3f} |" for value in row.values()), flush=True)
    result = json.dumps(
        {"benchmark": "edit_guidance", "model": given.model, "edits": given.edits, "rows": rows, **machine("cpu")}
    )
    print(result)
    if given.output:
        given.output.write_text(result + "\n")


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
