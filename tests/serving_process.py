"""A server as a process of its own, on a free port of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import diptych


@dataclass
class Running:
    """A server. address: without a path; log: the file of what it says."""

    process: subprocess.Popen[str]
    address: str
    log: Path

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def memory(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss


def started(log: Path, *arguments: str, **environment: str) -> Running:
    """A server, once it listens."""
    source = str(Path(diptych.__file__).parent.parent)
    values = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", **environment}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "diptych", "serve", *arguments, "--port", "0", "-v", "--device", "cpu"],
            stdout=subprocess.PIPE, stderr=errors, text=True, env=values,
        )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    if "http://" not in line:
        process.kill()
        raise AssertionError(f"no server: {line}{log.read_text()}")
    return Running(process, line.split()[-1], log)


def ended(server: Running) -> None:
    server.process.terminate()
    try:
        server.process.wait(timeout=40)
    except subprocess.TimeoutExpired:
        server.process.kill()
        server.process.wait()
    if server.process.stdout is not None:
        server.process.stdout.close()


def wait_until(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
