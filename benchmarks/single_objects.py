"""What of a full description toy models follow: the place, colour and shape of a single object.

    python benchmarks/single_objects.py MODEL ... [--scenes 96] [--output FILE]

The scenes are those of a stream of their own, of one object each; a caption says all of its scene, and nothing is
written out before it is drawn. Noise of seeds 0, 1, ..., at the model's own number of steps. The detector reads each
picture: a share is that of the pictures in which it finds one object, at the right place, of the right colour, of the
right shape. There are four places, seven colours and four shapes. The last line, and FILE, are JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from diptych.recipes.load import load
from diptych.toyworld.confusions import in_cells
from diptych.toyworld.detector import detect
from diptych.toyworld.language import describe
from diptych.toyworld.scene import Scene, generator
from measure import machine

SEED = 99
"""Of the scenes, which are no task's."""


def single_objects(count: int) -> list[Scene]:
    """The first `count` scenes of the stream that have one object."""
    scenes: list[Scene] = []
    index = 0
    while len(scenes) < count:
        scene = Scene.random(generator(SEED, "probe", index))
        index += 1
        if len(scene.objects) == 1:
            scenes.append(scene)
    return scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--scenes", type=int, default=96)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    scenes = single_objects(given.scenes)
    captions = [describe(scene) for scene in scenes]
    rows: list[dict[str, str | float]] = []
    print("| model | one object | place | colour | shape |\n|---|---|---|---|---|")
    for model in given.models:
        pictures = load(model).generate(captions, seed=list(range(len(captions))), output_type="pt", prompt_expansion=0)
        right = {"one object": 0, "place": 0, "colour": 0, "shape": 0}
        for scene, picture in zip(scenes, pictures, strict=True):
            [wanted], found = scene.objects, detect(picture).detections
            if len(found) == 1:
                right["one object"] += 1
                right["place"] += bool(in_cells(found, picture.shape[-1])[wanted.cell])
                right["colour"] += found[0].colour == wanted.colour
                right["shape"] += found[0].shape == wanted.shape
        shares = {name: count / len(scenes) for name, count in right.items()}
        rows.append({"model": model, **shares})
        print(f"| {model} |", *(f"{share:.3f} |" for share in shares.values()), flush=True)
    result = json.dumps({"benchmark": "single_objects", "scenes": given.scenes, "rows": rows, **machine("cpu")})
    if given.output is not None:
        given.output.write_text(result + "\n", encoding="utf-8")
    print(result)


if __name__ == "__main__":
    main()
