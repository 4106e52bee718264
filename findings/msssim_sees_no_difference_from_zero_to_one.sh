#!/usr/bin/env bash
# pytorch_msssim 1.0.0: `ssim` takes pictures for levels from 0 to 255 and does not look at them. Two unrelated pictures of noise from 0 to 1
# are alike by 0.996; with data_range=1 it is 0.01. A comparison that leaves the argument out shows every pair as nearly equal.
# Output: "as called: above 0.99 True", "data_range 1: below 0.05 True".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 pytorch-msssim==1.0.0
cat > "$folder/look.py" <<'PYTHON'
import torch
from pytorch_msssim import ssim

torch.manual_seed(0)
first, second = torch.rand(2, 1, 3, 64, 64)
as_called, with_range = float(ssim(first, second)), float(ssim(first, second, data_range=1.0))
print(f"as called: above 0.99 {as_called > 0.99}")
print(f"data_range 1: below 0.05 {with_range < 0.05}")
assert as_called > 0.99 and with_range < 0.05
PYTHON
cd "$folder"
"$folder/venv/bin/python" -W ignore "$folder/look.py"
