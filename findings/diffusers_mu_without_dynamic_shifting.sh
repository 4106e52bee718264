#!/usr/bin/env bash
# diffusers 0.42.1: of shift and mu FlowMatchEulerDiscreteScheduler ignores one without an error or a warning. Without
# use_dynamic_shifting, set_timesteps(n, mu=...) changes nothing; with it, the shift that the configuration holds changes nothing.
# Output: "mu changes nothing: True" and "shift changes nothing: True".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cat > "$folder/look.py" <<'PYTHON'
from diffusers import FlowMatchEulerDiscreteScheduler


def levels(mu=None, **options):
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    scheduler.set_timesteps(4, mu=mu)
    return [round(x, 5) for x in scheduler.sigmas.tolist()]


mu_ignored = levels(shift=3.0) == levels(mu=1.0, shift=3.0)
print("mu changes nothing:", mu_ignored)
shift_ignored = levels(mu=1.0, use_dynamic_shifting=True) == levels(mu=1.0, use_dynamic_shifting=True, shift=3.0)
print("shift changes nothing:", shift_ignored)
assert mu_ignored and shift_ignored
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py"
