#!/usr/bin/env bash
# diffusers 0.42.1: FlowMatchEulerDiscreteScheduler with a shift s does not sample the times that s makes of 1 ... 1/1000.
# It shifts the ends of its training schedule once when it is made, spaces the steps between them, and shifts again, so that the
# last noise level before 0 is the twice shifted 1/1000: 0.00893 for s = 3 where one shift gives 0.00299. A sampler of one shift
# therefore differs from the pipelines in its last steps. Levels that the caller gives (sigmas=...) are shifted once.
# Output: "4 steps, shift 3: [1.0, 0.85769, 0.60215, 0.00893, 0.0]" and "given levels: [1.0, 0.9, 0.75, 0.5, 0.0]".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cat > "$folder/look.py" <<'PYTHON'
import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler

scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
scheduler.set_timesteps(4)
made = [round(x, 5) for x in scheduler.sigmas.tolist()]
print("4 steps, shift 3:", made)


def shifted(t):
    return 3 * t / (1 + 2 * t)


assert made[3] == round(shifted(shifted(0.001)), 5) == 0.00893, made
assert made[3] != round(shifted(0.001), 5)
scheduler.set_timesteps(sigmas=np.linspace(1, 0.25, 4))
given = [round(x, 5) for x in scheduler.sigmas.tolist()]
print("given levels:", given)
assert given == [round(shifted(x), 5) for x in (1, 0.75, 0.5, 0.25, 0)], given
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py"
