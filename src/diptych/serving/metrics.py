"""Counters of the server, as the text that Prometheus reads."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import psutil
import torch

HELP = {
    "diptych_requests_total": "counter Requests by path and status.",
    "diptych_images_total": "counter Images that were made.",
    "diptych_text_tokens_total": "counter Tokens of text that were written.",
    "diptych_cancelled_total": "counter Requests that were cancelled.",
    "diptych_steps_total": "counter Rounds of the engine.",
    "diptych_decoder_runs_total": "counter Runs of the decoder.",
    "diptych_decoder_rows_total": "counter Rows in all runs of the decoder; by the runs, the mean batch.",
    "diptych_decoder_rows_last": "gauge Rows in the last run of the decoder.",
    "diptych_round_seconds_total": "counter Seconds in rounds of the engine.",
    "diptych_cache_hits_total": "counter Requests that were answered from the cache.",
    "diptych_phase_seconds_total": "counter Seconds by phase: queue, prepare, draw, write, encode.",
    "diptych_running": "gauge Requests that run.",
    "diptych_waiting": "gauge Requests that wait.",
    "diptych_memory_bytes": "gauge Resident memory of the process.",
    "diptych_device_memory_bytes": "gauge Memory that PyTorch holds on the GPU.",
}


class Metrics:
    """Numbers that threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, float] = {"diptych_running": 0, "diptych_waiting": 0}

    def count(self, name: str, amount: float = 1, labels: str = "") -> None:
        """Add to a counter; labels are as in `path="/v1/models"`."""
        key = f"{name}{{{labels}}}" if labels else name
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def put(self, name: str, value: float) -> None:
        """Set a gauge."""
        with self._lock:
            self._values[name] = value

    def seconds(self, phase: str, value: float) -> None:
        """Time that a phase took."""
        self.count("diptych_phase_seconds_total", value, f'phase="{phase}"')

    def batches(self, runs: Sequence[int]) -> None:
        """Rows of the decoder's runs in one round."""
        self.count("diptych_decoder_runs_total", len(runs))
        self.count("diptych_decoder_rows_total", sum(runs))
        if runs:
            self.put("diptych_decoder_rows_last", runs[-1])

    def rounds(self, taken: float, running: int, waiting: int) -> None:
        """A round of the engine."""
        self.count("diptych_steps_total")
        self.count("diptych_round_seconds_total", taken)
        self.put("diptych_running", running)
        self.put("diptych_waiting", waiting)

    def value(self, name: str) -> float:
        """A number by its name and labels; 0 for one that was never counted."""
        with self._lock:
            return self._values.get(name, 0)

    def text(self) -> str:
        """All of them, in Prometheus' text format."""
        self.put("diptych_memory_bytes", psutil.Process().memory_info().rss)
        if torch.cuda.is_available():
            self.put("diptych_device_memory_bytes", torch.cuda.memory_reserved())
        with self._lock:
            values = sorted(self._values.items())
        lines: list[str] = []
        named: set[str] = set()
        for key, value in values:
            name = key.partition("{")[0]
            if name in HELP and name not in named:
                kind, _, words = HELP[name].partition(" ")
                lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
                named.add(name)
            lines.append(f"{key} {int(value) if value == int(value) else repr(value)}")
        return "\n".join(lines) + "\n"
