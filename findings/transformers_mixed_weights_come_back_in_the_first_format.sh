#!/usr/bin/env bash
# transformers 5.23.0: save_pretrained writes each weight in its own number format, and config.json has the format of the first of them alone;
# from_pretrained then brings every weight into that. Norms that were trained in float32 beside bfloat16 layers lose what float32
# held, and one float32 embedding in front makes the whole bfloat16 model twice as large. There is no warning either way, and the file has it right.
# Output, of norms in float32: "file: bfloat16, float32", "config.json: bfloat16", "read again: bfloat16", "norms kept: False";
# of an embedding in float32: "file: bfloat16, float32", "config.json: float32", "read again: float32", "norms kept: True".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cat > "$folder/look.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
)


def formats(tensors):
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})


def trial(wide, folder):
    """A bfloat16 model whose weights with `wide` in their names are float32, saved and read again."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn(parameter.shape).to(torch.float32 if wide in name else torch.bfloat16)
    model.save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(folder)
    norms = [name for name, _ in model.named_parameters() if "norm" in name]
    before, after = (dict(each.named_parameters()) for each in (model, read))
    found = {
        "file": formats(load_file(Path(folder, "model.safetensors")).values()),
        "config.json": [json.loads(Path(folder, "config.json").read_text())["dtype"]],
        "read again": formats(read.parameters()),
        "norms kept": [all(torch.equal(before[name].float(), after[name].float()) for name in norms)],
    }
    for name, value in found.items():
        print(f"{wide} in float32, {name}:", *value)
    return list(found.values())


both = ["bfloat16", "float32"]
assert trial("norm", f"{sys.argv[1]}/a") == [both, ["bfloat16"], ["bfloat16"], [False]]
assert trial("embed", f"{sys.argv[1]}/b") == [both, ["float32"], ["float32"], [True]]
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py" "$folder"
