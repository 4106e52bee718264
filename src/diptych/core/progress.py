"""Progress bars on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

LOG_SECONDS = 30.0


def progress_bar(what: str, unit: str, **options: Any) -> tqdm[Any]:
    """A bar that moves often in a terminal, and says where it is every 30 seconds where stderr is a log.

    Args:
        what: stands before the bar.
        unit: what is counted, in the singular.
        options: tqdm's own.
    """
    from tqdm import tqdm

    often: dict[str, Any] = {} if sys.stderr.isatty() else {"mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS}
    return tqdm(desc=what, unit=unit, dynamic_ncols=True, **often, **options)
