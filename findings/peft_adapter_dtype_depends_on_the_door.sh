#!/usr/bin/env bash
# peft 0.21.2: the number format of a LoRA adapter on a bfloat16 model depends on which function puts it there. get_peft_model makes
# float32 adapters, inject_adapter_in_model makes bfloat16 ones, which small updates of an optimiser do not change.
# Output: "get_peft_model: torch.float32" and "inject_adapter_in_model: torch.bfloat16".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.23.0
cat > "$folder/look.py" <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

config = LoraConfig(r=2, target_modules=["0"])


def formats(model):
    return {str(p.dtype) for name, p in model.named_parameters() if "lora_" in name}


def base():
    return torch.nn.Sequential(torch.nn.Linear(8, 8)).bfloat16()


wrapped = formats(get_peft_model(base(), config))
injected = formats(inject_adapter_in_model(config, base()))
print("get_peft_model:", *wrapped)
print("inject_adapter_in_model:", *injected)
assert wrapped == {"torch.float32"} and injected == {"torch.bfloat16"}
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py"
