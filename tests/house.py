"""How large the house is, and how far a reader has to walk in it. By hand:

    python tests/house.py [FOLDER ...]     # roots of checkouts; this one when none is given

Lines are those of all .py files, by room. An abstract class is one that has an abstract method in its own body.

A walk is made, not guessed: a fresh process runs the code, and counts the files of Diptych in which a function is
entered. Functions that run while a module is imported do not count. By import, it counts the files of Diptych that the
process has loaded at that point, called or not.

- load to module: `diptych.recipes.load.load("toy/iomm")`, until the decoder is built (its constructor has returned);
- train to loss: `train_recipe` with `toy/iomm_pretrain_image` for one step, until a system's `losses` has returned.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

LOAD = """
from diptych.recipes.load import load
walk(lambda: load("toy/iomm"), "__init__", "parts/decoders/mmdit.py", "MMDiT")
"""
TRAIN = """
from pathlib import Path
from diptych.recipes.recipe import load
from diptych.recipes.run import train_recipe
values = ["stages.pretrain.steps=1", "stages.pretrain.data.held_out=0", "run.device=cpu", "run.tensorboard=false"]
recipe, plain = load("toy/iomm_pretrain_image", [*values, "run.validate_every=0", "run.sample_every=0"])
walk(lambda: train_recipe(recipe, plain, Path(FOLDER) / "run"), "losses", "systems/", None)
"""
WALK = """
import json, sys
from pathlib import Path
import diptych
ROOT = str(Path(diptych.__file__).parent) + "/"
entered, importing = set(), 0

class Arrived(BaseException):
    pass

def walk(run, function, place, owner):
    def profile(frame, event, argument):
        global importing
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib") and code.co_name == "_find_and_load":
            importing += {"call": 1, "return": -1}.get(event, 0)
        if not code.co_filename.startswith(ROOT) or code.co_name == "<module>" or importing:
            return
        if event == "call":
            entered.add(code.co_filename)
        elif event == "return" and code.co_name == function and code.co_filename[len(ROOT):].startswith(place):
            if owner is None or type(frame.f_locals.get("self")).__name__ == owner:
                raise Arrived
    sys.setprofile(profile)
    try:
        run()
    except Arrived:
        pass
    finally:
        sys.setprofile(None)
    loaded = [m for m in sys.modules.values() if (getattr(m, "__file__", None) or "").startswith(ROOT)]
    print(json.dumps({"called": sorted(f[len(ROOT):] for f in entered), "imported": len(loaded)}))
"""


def walked(root: Path, script: str) -> dict[str, object]:
    """What a walk in the checkout at `root` enters."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        code = f"FOLDER = {folder!r}\n{WALK}\n{script}"
        ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{root}: {ended.stderr[-2000:]}")
    return json.loads(ended.stdout.strip().split("\n")[-1])


def abstract(tree: ast.AST) -> int:
    """Classes with an abstract method in their own body."""
    found = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            marks = [ast.unparse(mark) for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)
                     for mark in part.decorator_list]  # fmt: skip
            found += any(mark.endswith("abstractmethod") for mark in marks)
    return found


def measure(root: Path) -> dict[str, object]:
    """The figures of the checkout at `root`."""
    lines: Counter[str] = Counter()
    tests = classes = comments = 0
    longest = ("", 0)
    for path in sorted((root / "src" / "diptych").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(root / "src" / "diptych")
        count = text.count("\n")
        lines[name.parts[0] if len(name.parts) > 1 else "(top)"] += count
        tree = ast.parse(text)
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        tests += sum(isinstance(call.func, ast.Name) and call.func.id == "isinstance" for call in calls)
        classes += abstract(tree)
        comments += sum(line.lstrip().startswith("#") for line in text.split("\n"))
        longest = max(longest, (str(name), count), key=lambda row: row[1])
    total = sum(lines.values())
    load, train = walked(root, LOAD), walked(root, TRAIN)
    return {
        **{f"lines: {room}": count for room, count in sorted(lines.items())},
        "lines: all": total,
        "longest file": f"{longest[0]} ({longest[1]})",
        "isinstance per thousand lines": round(1000 * tests / total, 2),
        "comment lines, per cent": round(100 * comments / total, 2),
        "abstract classes": classes,
        "load to module, files called": len(load["called"]),  # type: ignore[arg-type]
        "load to module, files imported": load["imported"],
        "train to loss, files called": len(train["called"]),  # type: ignore[arg-type]
        "train to loss, files imported": train["imported"],
    }


def main() -> None:
    roots = [Path(name) for name in sys.argv[1:]] or [Path(__file__).parents[1]]
    figures = [measure(root.resolve()) for root in roots]
    names = list(dict.fromkeys(name for found in figures for name in found))
    print("| | " + " | ".join(str(root) for root in roots) + " |\n|---|" + "---|" * len(roots))
    for name in names:
        print(f"| {name} | " + " | ".join(str(found.get(name, "")) for found in figures) + " |")


if __name__ == "__main__":
    main()
