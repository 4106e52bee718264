#!/usr/bin/env bash
# wandb 0.31.0: wandb.Image of an array or tensor of floats from 0 to 1, what every model puts out, is a black picture: the values are
# cut to integers and not scaled. Floats from -1 to 1 and from 0 to 255 are drawn as expected, so that only the commonest range is lost;
# of a boolean mask, True becomes 1 of 255. No warning is given.
# Output: the darkest and lightest value of each picture, "0 to 0.99: 0 0", "-1 to 1: 0 255", "0 to 255: 0 255", "tensor 0 to 1: 0 1", "mask: 0 1".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check wandb==0.31.0 numpy==2.4.6 pillow==12.3.0 torch==2.13.0
cat > "$folder/look.py" <<'PYTHON'
import numpy as np
import torch
import wandb

ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
cases = {
    "0 to 0.99": 0.99 * ramp,
    "-1 to 1": 2 * ramp - 1,
    "0 to 255": 255 * ramp,
    "tensor 0 to 1": torch.from_numpy(ramp)[None],
    "mask": ramp > 0.5,
}
seen = {}
for name, values in cases.items():
    levels = np.asarray(wandb.Image(values).image)
    seen[name] = (int(levels.min()), int(levels.max()))
    print(f"{name}: {levels.min()} {levels.max()}")
assert seen == {"0 to 0.99": (0, 0), "-1 to 1": (0, 255), "0 to 255": (0, 255), "tensor 0 to 1": (0, 1), "mask": (0, 1)}, seen
PYTHON
cd "$folder"
"$folder/venv/bin/python" -W ignore "$folder/look.py"
