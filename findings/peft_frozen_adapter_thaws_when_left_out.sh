#!/usr/bin/env bash
# peft 0.21.2: an adapter that was loaded frozen, as PeftModel.from_pretrained does by default, has requires_grad set once the block
# `with model.disable_adapter()` ends: leaving an adapter out once, for a reference or a teacher, makes it learn. An optimiser over all
# parameters then moves it, with no warning. An adapter that is loaded and not left out stays as it is.
# Output: "loaded: frozen", "left out once: learns", "an optimiser step afterwards moves it: True", "never left out: False".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.23.0
cat > "$folder/look.py" <<'PYTHON'
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model

config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)


def base():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"query": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 4)})


def adapter(model):
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def state(model):
    return "learns" if all(parameter.requires_grad for parameter in adapter(model).values()) else "frozen"


def moved(model):
    model.base_model.model["head"].requires_grad_(True)  # what is to be trained
    before = {name: parameter.detach().clone() for name, parameter in adapter(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    layers = model.base_model.model
    layers["head"](layers["query"](torch.ones(2, 4))).sum().backward()
    optimizer.step()
    return any(not torch.equal(before[name], parameter) for name, parameter in adapter(model).items())


get_peft_model(base(), config).save_pretrained(sys.argv[1])
left_out, kept = (PeftModel.from_pretrained(base(), sys.argv[1]) for _ in range(2))
found = [state(left_out)]
with left_out.disable_adapter():
    pass
found += [state(left_out), moved(left_out), moved(kept)]
print("loaded:", found[0])
print("left out once:", found[1])
print("an optimiser step afterwards moves it:", found[2])
print("never left out:", found[3])
assert found == ["frozen", "learns", True, False]
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py" "$folder/adapter"
