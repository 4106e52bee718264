#!/usr/bin/env bash
# gradio 6.31.0: gr.Image hands a function the hidden colour of transparent pixels (a cut-out on a transparent ground arrives with whatever
# its editor left there) and a 16-bit greyscale picture as nearly all white, both without a word; a photograph's EXIF turn is honoured.
# Output: "transparent: (10, 200, 30)", "16 bit at 46 %: (255, 255, 255)", "turned: (8, 16)".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check gradio==6.31.0 numpy==2.4.6 pillow==12.3.0
cat > "$folder/look.py" <<'PYTHON'
import os

import gradio as gr
import numpy as np
from gradio.data_classes import ImageData
from PIL import Image

Image.new("RGBA", (8, 8), (10, 200, 30, 0)).save("transparent.png")
Image.fromarray(np.full((8, 8), 30000, np.uint16)).save("deep.png")
exif = Image.Exif()
exif[0x0112] = 6
Image.new("RGB", (16, 8)).save("turned.jpg", exif=exif)


def received(name):
    return gr.Image(type="pil").preprocess(ImageData(path=os.path.abspath(name), orig_name=name))


print("transparent:", received("transparent.png").getpixel((0, 0)))
print("16 bit at 46 %:", received("deep.png").getpixel((0, 0)))
print("turned:", received("turned.jpg").size)
assert received("transparent.png").getpixel((0, 0)) == (10, 200, 30)
assert received("deep.png").getpixel((0, 0)) == (255, 255, 255)
assert received("turned.jpg").size == (8, 16)
PYTHON
cd "$folder"
"$folder/venv/bin/python" -W ignore "$folder/look.py"
