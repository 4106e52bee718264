"""Which process wrote something, and whether it still runs."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process on a machine. start: when it began, in the kernel's ticks since the machine did; 0 where that is not
    known. A number that another process was given later has another start. host: a digest of machine and boot."""

    pid: int
    start: int = 0
    host: str = ""

    @property
    def tag(self) -> str:
        """The process as a part of a file name."""
        return f"{self.pid}-{self.start}-{self.host}"

    @property
    def here(self) -> bool:
        """Whether it ran on this machine, since its last start."""
        return self.host in ("", machine())

    @property
    def alive(self) -> bool:
        """Whether it still runs. Of a process on another machine nothing is known: it counts as alive."""
        if not self.here:
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        now = started(self.pid)
        return now is not None and (not self.start or not now or now == self.start)


def read_tag(tag: str) -> Process | None:
    """The process of a tag; None for a text that is none. A number alone is a process of an earlier version's file."""
    if tag.isdigit():
        return Process(int(tag))
    match = re.fullmatch(r"(\d+)-(\d+)-([0-9a-f]+)", tag)
    return Process(int(match[1]), int(match[2]), match[3]) if match else None


def this_process() -> Process:
    """The process that asks."""
    return Process(os.getpid(), started(os.getpid()) or 0, machine())


def started(pid: int) -> int | None:
    """When a process began; 0 where the system does not say, None for one that has ended and only waits to be noted."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return None if fields[0] in ("Z", "X") else int(fields[19])


@cache
def machine() -> str:
    """A digest of this machine's name, of its last start, and of the container whose process numbers these are."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = ""
    return hashlib.blake2b(f"{socket.gethostname()}\n{boot}".encode(), digest_size=4).hexdigest()
