"""A server as a process of its own, on a free port of this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil

import diptych
import warm


@dataclass
class Running:
    """A server. address: without a path; log: the file of what it says."""

    process: subprocess.Popen[bytes] | ForkServerProcess
    address: str
    log: Path

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def memory(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def wait(self, seconds: float) -> int | None:
        """The code with which it ends; None if it still runs."""
        if isinstance(self.process, ForkServerProcess):
            self.process.join(seconds)
            return self.process.exitcode
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


def started(log: Path, *arguments: str, interpreter: bool = False, **environment: str) -> Running:
    """A server, once it listens; in an interpreter of its own, or forked (`warm`)."""
    words = ("serve", *arguments, "--port", "0", "-v", "--device", "cpu")
    if interpreter:
        source = str(Path(diptych.__file__).parent.parent)
        values = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", **environment}
        with log.open("w") as said:
            process: Any = subprocess.Popen(
                [sys.executable, "-m", "diptych", *words], stdout=said, stderr=said, env=values
            )
    else:
        process = warm.command(*words, output=log, environment=environment)
    server = Running(process, "", log)
    until = time.monotonic() + 300
    while not server.address:
        if server.wait(0.02) is not None or time.monotonic() > until:
            process.kill()
            raise AssertionError(f"no server: {log.read_text()}")
        if log.is_file() and (line := re.search(r"^serving .* at (http:\S+)\n", log.read_text(), re.MULTILINE)):
            server.address = line[1]
    return server


def ended(server: Running) -> None:
    server.process.terminate()
    if server.wait(40) is None:
        server.process.kill()
        server.wait(10)


def with_key(server: Running, key: str) -> Any:
    """The official client, with a key."""
    import openai

    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=key, max_retries=0, timeout=60)


def wait_until(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
