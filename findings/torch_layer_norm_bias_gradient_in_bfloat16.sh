#!/usr/bin/env bash
# torch 2.13.0, CPU: in bfloat16 the gradient of the bias of LayerNorm stops growing at 256 for each thread where 4,096 ones are added, while
# those of Linear, Conv2d and RMSNorm are summed in float32 and reach 4,096. Which parameters of a bfloat16 model get a gradient
# that is too small depends on the kind of layer.
# Output: "LayerNorm bias 256.0, Linear bias 4096.0, Conv2d bias 4096.0, RMSNorm weight 4096.0".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/look.py" <<'PYTHON'
import torch
from torch import nn

torch.set_num_threads(1)
rows = 4096
torch.manual_seed(0)
norm = nn.LayerNorm(4).bfloat16()
norm(torch.randn(rows, 4, dtype=torch.bfloat16)).sum().backward()
linear = nn.Linear(4, 4).bfloat16()
linear(torch.zeros(rows, 4, dtype=torch.bfloat16)).sum().backward()
conv = nn.Conv2d(4, 4, 1).bfloat16()
conv(torch.zeros(1, 4, 64, 64, dtype=torch.bfloat16)).sum().backward()
rms = nn.RMSNorm(4).bfloat16()
rms(torch.ones(rows, 4, dtype=torch.bfloat16)).sum().backward()
seen = [x.grad.flatten()[0].item() for x in (norm.bias, linear.bias, conv.bias, rms.weight)]
print("LayerNorm bias {}, Linear bias {}, Conv2d bias {}, RMSNorm weight {}".format(*seen))
assert seen == [256.0, 4096.0, 4096.0, 4096.0], seen
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py"
