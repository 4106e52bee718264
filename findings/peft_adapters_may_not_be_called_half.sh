#!/usr/bin/env bash
# peft 0.21.2 (torch 2.13.0): an adapter cannot be called by the name of anything that a module has, as "half", "type", "forward" or "train",
# and what is raised is a KeyError that says "already exists", though no adapter of the name does.
# Output: "style: accepted", and "KeyError" for each of half, type, forward, train, keys.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.23.0
cat > "$folder/look.py" <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model

for name in ("style", "half", "type", "forward", "train", "keys"):
    model = torch.nn.ModuleDict({"query": torch.nn.Linear(2, 2)})
    try:
        get_peft_model(model, LoraConfig(r=1, target_modules=["query"]), adapter_name=name)
        seen = "accepted"
    except KeyError as error:
        assert "already exists" in str(error)
        seen = "KeyError"
    print(f"{name}: {seen}")
    assert seen == ("accepted" if name == "style" else "KeyError")
PYTHON
cd "$folder"
"$folder/venv/bin/python" -W ignore "$folder/look.py"
