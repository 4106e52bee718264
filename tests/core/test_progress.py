"""Progress bars: often in a terminal, seldom in a log."""

from __future__ import annotations

import io
import sys

import pytest

from diptych.core.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "at_least", "at_most"), [(io.StringIO(), 3, 12), (Terminal(), 30, 1002)])
def test_a_log_gets_few_lines_and_the_last(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, at_least: int, at_most: int
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("stage", "step", total=1000) as bar:
        for _ in range(1000):
            bar.start_t, bar.last_print_t = bar.start_t - 0.2, bar.last_print_t - 0.2  # as if so much time had passed
            bar.update()
    lines = stream.getvalue().split("\r")
    assert at_least <= len(lines) - 1 <= at_most
    assert "stage: 100%" in lines[-1]
    assert "1000/1000" in lines[-1]
