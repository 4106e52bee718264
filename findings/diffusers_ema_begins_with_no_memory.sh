#!/usr/bin/env bash
# diffusers 0.42.1: EMAModel with decay=0.999 and without warm-up uses another decay for its first thousands of steps: 0 at the first, at
# which the average is overwritten by the weights, and (1 + n) / (10 + n) after it; 0.999 is reached after 8,990 steps. `use_ema_warmup` changes
# the curve and does not switch it on.
# Output: "decays of the first steps: 0.000 0.182 0.250 0.308", "first step that uses 0.999: 8991".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.23.0
cat > "$folder/look.py" <<'PYTHON'
import torch
from diffusers.training_utils import EMAModel

layer = torch.nn.Linear(1, 1)
average = EMAModel(layer.parameters(), decay=0.999)
decays = []
while not decays or decays[-1] < 0.999:
    average.step(layer.parameters())
    decays.append(average.cur_decay_value)
print("decays of the first steps:", *(f"{decay:.3f}" for decay in decays[:4]))
print("first step that uses 0.999:", len(decays))
assert [round(decay, 3) for decay in decays[:4]] == [0.0, 0.182, 0.25, 0.308]
assert 8900 < len(decays) < 9100
PYTHON
cd "$folder"
"$folder/venv/bin/python" -W ignore "$folder/look.py"
