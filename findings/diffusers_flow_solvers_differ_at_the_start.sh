#!/usr/bin/env bash
# diffusers 0.42.1: with the same use_flow_sigmas and flow_shift, UniPC and DPM-Solver++ do not step through the same noise levels:
# for 4 steps and shift 3 UniPC starts at 0.999999 and goes to 0.90012, DPM-Solver++ starts at 0.99967 and goes to 0.89964. Exchanging
# one solver for the other in a comparison changes the schedule too.
# Output: "UniPC [1.0, 0.90012, 0.75037, 0.501, 0.0]" and "DPM-Solver++ [0.99967, 0.89964, 0.74962, 0.49967, 0.0]".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 scipy==1.17.1
cat > "$folder/look.py" <<'PYTHON'
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

levels = {}
for name, kind in (("UniPC", UniPCMultistepScheduler), ("DPM-Solver++", DPMSolverMultistepScheduler)):
    scheduler = kind(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    scheduler.set_timesteps(4)
    levels[name] = [round(x, 5) for x in scheduler.sigmas.tolist()]
    print(name, levels[name])
assert levels["UniPC"] == [1.0, 0.90012, 0.75037, 0.501, 0.0]
assert levels["DPM-Solver++"] == [0.99967, 0.89964, 0.74962, 0.49967, 0.0]
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py"
