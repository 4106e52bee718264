"""The end of a process that has loaded a model."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import atexit, gc, sys, weakref
class Loop:
    def __del__(self): print("looked at", flush=True)
atexit.register(lambda: print("registered", flush=True))
loop = Loop(); loop.itself = loop
from diptych.core.leaving import leave_quickly
if sys.argv[1] == "quickly":
    leave_quickly(); leave_quickly()
gc.disable()  # so that nothing is looked at before the end
del loop
"""


def test_the_last_collection_is_left_out_and_what_is_registered_runs() -> None:
    """A cycle is looked at once more at the end of a process, and is not where the process leaves quickly."""
    said = {
        way: subprocess.run([sys.executable, "-c", CODE, way], check=True, capture_output=True, text=True).stdout.split(
            "\n"
        )
        for way in ("slowly", "quickly")
    }
    assert said == {"slowly": ["registered", "looked at", ""], "quickly": ["registered", ""]}
