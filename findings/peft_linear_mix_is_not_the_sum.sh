#!/usr/bin/env bash
# peft 0.21.2: add_weighted_adapter with weights 1 and 1 does not give what the two adapters do together. "linear" adds the A and the B
# matrices by themselves, and the products of one's A with the other's B come along; "svd", the default, keeps the larger of the two ranks.
# Only "cat", whose rank is the sum, equals both adapters active at once.
# Output: the relative error, "linear: 0.98", "svd: 0.25", "cat: 0.00" (the first two above 0.1), "both active: 0.00".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.23.0
cat > "$folder/look.py" <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.query = torch.nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.query(x)


model = Model()
base = model.query.weight.detach().clone()
config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
adapted = get_peft_model(model, config, adapter_name="first")
adapted.add_adapter("second", config)
layer = adapted.base_model.model.query
total = layer.get_delta_weight("first") + layer.get_delta_weight("second")
errors = {}
for kind in ("linear", "svd", "cat"):
    adapted.add_weighted_adapter(["first", "second"], [1.0, 1.0], kind, combination_type=kind)
    errors[kind] = float((layer.get_delta_weight(kind) - total).norm() / total.norm())
    print(f"{kind}: {errors[kind]:.2f}")
adapted.base_model.set_adapter(["first", "second"])
x = torch.randn(16, 8)
expected = x @ (base + total).T
both = float((adapted(x) - expected).norm() / expected.norm())
print(f"both active: {both:.2f}")
assert errors["linear"] > 0.1 and errors["svd"] > 0.1 and errors["cat"] < 1e-5 and both < 1e-5
PYTHON
cd "$folder"
"$folder/venv/bin/python" -W ignore "$folder/look.py"
