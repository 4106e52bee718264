#!/usr/bin/env bash
# peft 0.21.2: of several target modules those that match nothing are passed over in silence as long as one matches; only a list of which
# none matches is refused. A misspelt target therefore trains fewer layers than its configuration says, and the saved
# adapter_config.json goes on naming it.
# Output: "one of two names matches: 1 layer adapted" and "no name matches: NoMatchingPeftModuleError".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.23.0
cat > "$folder/look.py" <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model


def base():
    return torch.nn.ModuleDict({"query": torch.nn.Linear(4, 4), "value": torch.nn.Linear(4, 4)})


model = get_peft_model(base(), LoraConfig(r=2, target_modules=["query", "valu"]))
adapted = [name for name, _ in model.named_modules() if name.endswith("lora_A")]
print("one of two names matches:", len(adapted), "layer adapted")
assert len(adapted) == 1
try:
    get_peft_model(base(), LoraConfig(r=2, target_modules=["valu"]))
    raise SystemExit("was accepted")
except ValueError as error:
    print("no name matches:", type(error).__name__)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py"
