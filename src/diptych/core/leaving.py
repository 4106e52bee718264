"""A quick end of the process."""

from __future__ import annotations

import atexit
import functools
import gc


@functools.cache
def leave_quickly() -> None:
    """At the end of the process, the collector passes over all that is there by then.

    Python looks through every object once more before it ends, which takes a second after PyTorch and transformers were
    imported, and finds nothing that the end of the process does not free. What is registered with `atexit` still runs.
    """
    atexit.register(gc.freeze)
