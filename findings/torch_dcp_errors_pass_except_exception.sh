#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint raises CheckpointException, which is a BaseException and no Exception, so that `except
# Exception` around loading (to try an older checkpoint, say) does not catch a missing key, and the process ends.
# Output: "an Exception: False, a BaseException: True" and "passed `except Exception`: True".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/look.py" <<'PYTHON'
import contextlib
import logging
import tempfile

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

logging.disable(logging.CRITICAL)
print(
    f"an Exception: {issubclass(CheckpointException, Exception)}, "
    f"a BaseException: {issubclass(CheckpointException, BaseException)}"
)
passed = False
with tempfile.TemporaryDirectory() as folder:
    dcp.save({"a": torch.zeros(2)}, checkpoint_id=folder)
    try:
        with contextlib.suppress(Exception):
            dcp.load({"a": torch.zeros(2), "b": torch.zeros(2)}, checkpoint_id=folder)
    except CheckpointException:
        passed = True
print("passed `except Exception`:", passed)
assert passed and not issubclass(CheckpointException, Exception)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py"
