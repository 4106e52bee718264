#!/usr/bin/env bash
# diffusers 0.42.1: DPMSolverMultistepScheduler(use_flow_sigmas=True) goes on reading the output of the network as noise. The levels
# are those of a flow, prediction_type stays "epsilon", and one step from noise level 0.9997 divides by 1 - 0.9997: a picture of ones
# and an output of 0.5 become about 151. There is no error and no warning; prediction_type="flow_prediction" must be given as well.
# Output: "prediction_type: epsilon", "after one step: 150.94", "with flow_prediction: 0.95".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cat > "$folder/look.py" <<'PYTHON'
import torch
from diffusers import DPMSolverMultistepScheduler

x = torch.ones(1, 1, 2, 2)
after = {}
for prediction in (None, "flow_prediction"):
    options = {} if prediction is None else {"prediction_type": prediction}
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, **options)
    scheduler.set_timesteps(4)
    after[prediction] = scheduler.step(x * 0.5, scheduler.timesteps[0], x).prev_sample.mean().item()
    if prediction is None:
        print("prediction_type:", scheduler.config.prediction_type)
        assert scheduler.config.prediction_type == "epsilon"
print(f"after one step: {after[None]:.2f}")
print(f"with flow_prediction: {after['flow_prediction']:.2f}")
assert after[None] > 100 and abs(after["flow_prediction"] - 0.95) < 0.01
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py"
