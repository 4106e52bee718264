#!/usr/bin/env bash
# datasets 5.2.0: to_parquet of a column of pictures that was made from paths writes the paths and no bytes: the file is worth nothing on
# another machine, and nothing says so. save_to_disk of the same rows holds the bytes.
# Output: "parquet: bytes None, path pictures/red.png", "after the pictures are gone: parquet FileNotFoundError, save_to_disk (8, 8)".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check datasets==5.2.0 pillow==12.3.0 pyarrow==26.0.1
cat > "$folder/look.py" <<'PYTHON'
import os
import shutil

import datasets
import pyarrow.parquet
from PIL import Image

datasets.disable_progress_bars()
os.makedirs("pictures")
Image.new("RGB", (8, 8), "red").save("pictures/red.png")
rows = datasets.Dataset.from_dict({"image": ["pictures/red.png"]}).cast_column("image", datasets.Image())
rows.to_parquet("rows.parquet")
rows.save_to_disk("rows")
cell = pyarrow.parquet.read_table("rows.parquet")["image"][0].as_py()
print(f"parquet: bytes {cell['bytes']}, path {cell['path']}")
assert cell == {"bytes": None, "path": "pictures/red.png"}
shutil.rmtree("pictures")
try:
    datasets.load_dataset("parquet", data_files="rows.parquet", split="train", cache_dir="cache")[0]
    raise SystemExit("was read")
except FileNotFoundError as error:
    size = datasets.load_from_disk("rows")[0]["image"].size
    print(f"after the pictures are gone: parquet {type(error).__name__}, save_to_disk {size}")
assert size == (8, 8)
PYTHON
cd "$folder"
"$folder/venv/bin/python" -W ignore "$folder/look.py"
