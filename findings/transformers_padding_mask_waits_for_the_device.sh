#!/usr/bin/env bash
# transformers 5.23.0: a padding mask without any padding costs a wait for the device at each call of a language model with the "sdpa"
# attention, since the values of the mask are looked at to leave it out; without a mask, and with "eager", nothing is read. On the meta device,
# where nothing can be read, the first of the three therefore fails.
# Output: "sdpa, no mask: runs", "sdpa, mask of ones: RuntimeError", "eager, mask of ones: runs".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cat > "$folder/look.py" <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaModel

seen = []
for attention, masked in (("sdpa", False), ("sdpa", True), ("eager", True)):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=8
    )
    config._attn_implementation = attention
    with torch.device("meta"):
        model = LlamaModel(config)
        ids = torch.zeros(2, 4, dtype=torch.long)
        mask = torch.ones(2, 4, dtype=torch.long) if masked else None
    try:
        model(input_ids=ids, attention_mask=mask)
        seen.append("runs")
    except RuntimeError as error:
        assert "item()" in str(error)
        seen.append("RuntimeError")
    print(f"{attention}, {'mask of ones' if masked else 'no mask'}: {seen[-1]}")
assert seen == ["runs", "RuntimeError", "runs"]
PYTHON
cd "$folder"
"$folder/venv/bin/python" -W ignore "$folder/look.py"
