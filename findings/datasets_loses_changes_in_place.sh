#!/usr/bin/env bash
# datasets 5.2.0: a picture that was opened from a file and changed in place (drawn on, pasted into, putpixel) is stored as the path of its
# file, so that the change is gone: a `map` that masks or marks its pictures in place returns them as they were. A copy keeps the change.
# Output: "from_dict: (255, 255, 255)", "map in place: (255, 255, 255)", "map of a copy: (0, 0, 0)".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check datasets==5.2.0 pillow==12.3.0
cat > "$folder/look.py" <<'PYTHON'
import datasets
from PIL import Image, ImageDraw

datasets.disable_progress_bars()
Image.new("RGB", (8, 8), "white").save("white.png")


def blacken(image):
    ImageDraw.Draw(image).rectangle((0, 0, 7, 7), fill="black")
    return image


columns = datasets.Features({"image": datasets.Image()})
direct = datasets.Dataset.from_dict({"image": [blacken(Image.open("white.png"))]}, features=columns)
rows = datasets.Dataset.from_dict({"image": ["white.png"]}, features=columns)
in_place = rows.map(lambda row: {"image": blacken(row["image"])})
copied = rows.map(lambda row: {"image": blacken(row["image"].copy())})
seen = {}
for name, made in {"from_dict": direct, "map in place": in_place, "map of a copy": copied}.items():
    seen[name] = made[0]["image"].getpixel((0, 0))
    print(f"{name}: {seen[name]}")
white = (255, 255, 255)
assert seen == {"from_dict": white, "map in place": white, "map of a copy": (0, 0, 0)}, seen
PYTHON
cd "$folder"
"$folder/venv/bin/python" -W ignore "$folder/look.py"
