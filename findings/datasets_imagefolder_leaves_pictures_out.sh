#!/usr/bin/env bash
# datasets 5.2.0: with a metadata.jsonl, "imagefolder" gives a row for each line and none for the other pictures: pictures without a line are
# left out in silence, a metadata.jsonl in one of two class folders takes the other folder and the labels out of the data set, a picture with two
# lines comes twice, and a line whose picture does not exist is a row that fails only when it is read.
# Output: "three pictures, two lines: 2 rows", "two classes, lines for one: 1 row, columns image, text", "a line twice: 3 rows",
# "a line without picture: 3 rows, FileNotFoundError when read".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check datasets==5.2.0 pillow==12.3.0
cat > "$folder/look.py" <<'PYTHON'
import json
from pathlib import Path

import datasets
from PIL import Image

datasets.disable_progress_bars()


def load(name, pictures, lines, at=""):
    for picture in pictures:
        path = Path(name, picture)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    rows = [json.dumps({"file_name": line, "text": "a caption"}) for line in lines]
    Path(name, at, "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return datasets.load_dataset("imagefolder", data_dir=name, split="train", cache_dir="cache")


rows = load("some", ["a.png", "b.png", "c.png"], ["a.png", "b.png"])
print("three pictures, two lines:", len(rows), "rows")
assert len(rows) == 2
rows = load("classes", ["cat/a.png", "dog/a.png"], ["a.png"], at="cat")
print("two classes, lines for one:", len(rows), "row, columns", ", ".join(rows.column_names))
assert len(rows) == 1 and rows.column_names == ["image", "text"]
rows = load("twice", ["a.png", "b.png"], ["a.png", "a.png", "b.png"])
print("a line twice:", len(rows), "rows")
assert len(rows) == 3
rows = load("gone", ["a.png", "b.png"], ["a.png", "b.png", "c.png"])
try:
    rows[2]
    raise SystemExit("was read")
except FileNotFoundError as error:
    print("a line without picture:", len(rows), f"rows, {type(error).__name__} when read")
assert len(rows) == 3
PYTHON
cd "$folder"
"$folder/venv/bin/python" -W ignore "$folder/look.py"
