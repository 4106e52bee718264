#!/usr/bin/env bash
# diffusers 0.42.1: VaeImageProcessor.preprocess scales a Pillow picture of 8 bits alone. An array of the same uint8 levels goes through unscaled,
# so that mid-grey becomes 255 instead of 0; a 16-bit picture becomes 234 and keeps one channel; a transparent one keeps four. Nothing is said.
# Output: "Pillow, 8 bit: (1, 3, 16, 16), 0.0", "array of uint8: (1, 3, 16, 16), 255.0", "Pillow, 16 bit: (1, 1, 16, 16), 234.3",
# "Pillow, RGBA: (1, 4, 16, 16), 0.0".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.23.0 pillow==12.3.0
cat > "$folder/look.py" <<'PYTHON'
import numpy as np
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

processor = VaeImageProcessor(vae_scale_factor=8)
grey = np.full((16, 16, 3), 128, np.uint8)
cases = {
    "Pillow, 8 bit": Image.fromarray(grey),
    "array of uint8": grey,
    "Pillow, 16 bit": Image.fromarray(np.full((16, 16), 30000, np.uint16)),
    "Pillow, RGBA": Image.new("RGBA", (16, 16), (128, 128, 128, 255)),
}
seen = {}
for name, image in cases.items():
    values = processor.preprocess(image)
    seen[name] = (tuple(values.shape), round(float(values[0, 0, 0, 0]), 1))
    print(f"{name}: {seen[name][0]}, {seen[name][1]}")
expected = [((1, 3, 16, 16), 0.0), ((1, 3, 16, 16), 255.0), ((1, 1, 16, 16), 234.3), ((1, 4, 16, 16), 0.0)]
assert list(seen.values()) == expected, seen
PYTHON
cd "$folder"
"$folder/venv/bin/python" -W ignore "$folder/look.py"
