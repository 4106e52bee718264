#!/usr/bin/env bash
# gradio 6.31.0: what a gr.Gallery, a gr.Image or a gr.ImageEditor shows and offers for download is lossy WebP unless `format` is set: a
# level of a noisy picture is off by more than 100 of 255.
# Output: "Image: WEBP, exact False", the same of Gallery and ImageEditor, and "Image of format png: PNG, exact True".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check gradio==6.31.0 numpy==2.4.6 pillow==12.3.0
cat > "$folder/look.py" <<'PYTHON'
import gradio as gr
import numpy as np
from PIL import Image

noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
picture = Image.fromarray(noise)


def report(name, path):
    shown = Image.open(path)
    worst = int(np.abs(np.asarray(shown.convert("RGB")).astype(int) - noise).max())
    print(f"{name}: {shown.format}, exact {worst == 0}")
    return shown.format, worst > 100


lossy = ("WEBP", True)
assert report("Image", gr.Image().postprocess(picture).path) == lossy
assert report("Gallery", gr.Gallery().postprocess([picture]).root[0].image.path) == lossy
edited = {"background": picture, "layers": [], "composite": picture}
assert report("ImageEditor", gr.ImageEditor().postprocess(edited).composite.path) == lossy
assert report("Image of format png", gr.Image(format="png").postprocess(picture).path) == ("PNG", False)
PYTHON
cd "$folder"
"$folder/venv/bin/python" -W ignore "$folder/look.py"
