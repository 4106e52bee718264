#!/usr/bin/env bash
# torchao 0.18.0: a layer whose weight `quantize_` has made int8 goes on saying float32, four bytes an element, so that memory counted from
# parameters is four times too much; `module.to(torch.bfloat16)` changes its bias and neither the weight nor anything else, without a word.
# Output: "says: torch.float32, 16384 bytes; holds: torch.int8, 4096 bytes", "after to(bfloat16): weight torch.float32, bias torch.bfloat16".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 torchao==0.18.0
cat > "$folder/look.py" <<'PYTHON'
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_

layers = torch.nn.Sequential(torch.nn.Linear(64, 64))
quantize_(layers, Int8WeightOnlyConfig())
weight = layers[0].weight
says = weight.numel() * weight.element_size()
print(f"says: {weight.dtype}, {says} bytes; holds: {weight.qdata.dtype}, {weight.qdata.numel()} bytes")
assert (weight.dtype, says, weight.qdata.dtype, weight.qdata.numel()) == (torch.float32, 16384, torch.int8, 4096)
layers.to(torch.bfloat16)
print(f"after to(bfloat16): weight {layers[0].weight.dtype}, bias {layers[0].bias.dtype}")
assert (layers[0].weight.dtype, layers[0].bias.dtype) == (torch.float32, torch.bfloat16)
PYTHON
cd "$folder"
"$folder/venv/bin/python" -W ignore "$folder/look.py"
