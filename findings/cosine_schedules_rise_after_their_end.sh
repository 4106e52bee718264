#!/usr/bin/env bash
# transformers 5.23.0 and diffusers 0.42.1: a cosine schedule rises again after its last step, to the full rate once the same number of steps
# is trained again; the linear one stays at 0. A run that goes on for longer than it was planned learns the faster.
# Output: the rate at every fourth of 16 steps where 8 were planned, "cosine: 1.0 0.5 0.0 0.5 1.0" of both, "linear: 1.0 0.5 0.0 0.0 0.0".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0 diffusers==0.42.1
cat > "$folder/look.py" <<'PYTHON'
import diffusers.optimization
import torch
import transformers


def rates(schedule):
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = schedule(optimizer)
    values = []
    for _ in range(17):
        values.append(round(optimizer.param_groups[0]["lr"], 3))
        optimizer.step()
        scheduler.step()
    return values[::4]


schedules = {
    "transformers, cosine": lambda optimizer: transformers.get_cosine_schedule_with_warmup(optimizer, 0, 8),
    "diffusers, cosine": lambda optimizer: diffusers.optimization.get_cosine_schedule_with_warmup(optimizer, 0, 8),
    "transformers, linear": lambda optimizer: transformers.get_linear_schedule_with_warmup(optimizer, 0, 8),
}
for name, schedule in schedules.items():
    values = rates(schedule)
    print(f"{name}:", *values)
    assert values == ([1.0, 0.5, 0.0, 0.0, 0.0] if "linear" in name else [1.0, 0.5, 0.0, 0.5, 1.0])
PYTHON
cd "$folder"
"$folder/venv/bin/python" -W ignore "$folder/look.py"
