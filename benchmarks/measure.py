"""What the benchmarks share: peak memory of a process, and what is said of the machine."""

from __future__ import annotations

import multiprocessing
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "diffusers")


def synchronize(device: str) -> None:
    """Wait for the device's queue."""
    if device == "cuda":
        torch.cuda.synchronize()


def resident(field: str) -> int:
    """A size from Linux's /proc/self/status (`VmRSS` now, `VmHWM` at most), in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


class Peak:
    """Memory of this process (or of CUDA's allocator) from here on, in bytes."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts again from the present level
        self.before = resident("VmRSS")

    def most(self) -> int:
        """The most that was held since."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        return resident("VmHWM")

    def rise(self) -> int:
        """The most that was held since, above the level at the start."""
        return self.most() - self.before


def in_own_process(call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a module's function, from a process that does nothing else, on one thread."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, call, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _send(sender: Any, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    sender.send(call(*arguments))


def machine(device: str) -> dict[str, Any]:
    """Hardware, load and versions, for the JSON line."""
    return {
        "hardware": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
