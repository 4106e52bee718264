#!/usr/bin/env bash
# transformers 5.23.0: in `size` of Qwen2-VL's image processor (and of its successors) "shortest_edge" and "longest_edge" are areas in pixels
# and not edges, the former min_pixels and max_pixels. {"shortest_edge": 224, "longest_edge": 448}, which other processors take for edges,
# leaves a picture of 640 x 480 with one visual token of 2 x 2 patches, without a word.
# Output: "edges 224 and 448: 2 x 2 patches", "areas 224 * 224 and 448 * 448: 26 x 36 patches", "default longest_edge: 1003520".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check transformers==5.23.0 numpy==2.4.6 pillow==12.3.0 torch==2.13.0
cat > "$folder/look.py" <<'PYTHON'
from PIL import Image
from transformers import Qwen2VLImageProcessorPil


def patches(**size):
    processor = Qwen2VLImageProcessorPil(size=size)
    return tuple(processor(Image.new("RGB", (640, 480)), return_tensors="np")["image_grid_thw"][0].tolist()[1:])


small = patches(shortest_edge=224, longest_edge=448)
large = patches(shortest_edge=224 * 224, longest_edge=448 * 448)
print("edges 224 and 448: {} x {} patches".format(*small))
print("areas 224 * 224 and 448 * 448: {} x {} patches".format(*large))
print("default longest_edge:", Qwen2VLImageProcessorPil().size["longest_edge"])
assert small == (2, 2) and large == (26, 36) and Qwen2VLImageProcessorPil().size["longest_edge"] == 1003520
PYTHON
cd "$folder"
"$folder/venv/bin/python" -W ignore "$folder/look.py"
