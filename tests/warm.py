"""Processes that begin with PyTorch and the package imported: forked from a server, which imports them once a session.

A new interpreter takes four seconds of imports before it does anything. What a test wants of a process of its own is
mostly that it can be killed, or that it is one of a group; how the command is entered is held by a few tests that
start an interpreter (`tests/cli/test_main.py`, `tests/training/test_parallel.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from torch import distributed

PR_SET_PDEATHSIG = 1
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.fsdp",
        "transformers",
        "diptych.recipes.run",
        "diptych.recipes.prepare",
        "diptych.evaluation.evaluate",
    ]
)


def start(
    function: Callable[..., object], *arguments: Any, output: Path, environment: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """A process that calls `function`, of a module that can be imported, with no GPU and the threads of this one.

    Args:
        output: the file for what it writes to stdout and stderr. environment: variables that it has beside ours.
    """
    values = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
    process = CONTEXT.Process(target=_run, args=(function, arguments, values, str(output), torch.get_num_threads()))
    process.start()
    return process


def command(*words: str, output: Path, environment: Mapping[str, str] | None = None) -> ForkServerProcess:
    """A process that runs the `diptych` command and ends with its exit code."""
    return start(enter, words, output=output, environment=environment)


def group(function: Callable[..., object], *arguments: Any, output: Path, count: int = 2, seconds: float = 300) -> None:
    """Call `function` in several processes that find each other, as torchrun starts them; an error in one ends all."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    every = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "none",
    }
    files = [output.with_name(f"{output.name}.{rank}") for rank in range(count)]
    processes = [
        start(function, *arguments, output=file, environment={**every, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, file in enumerate(files)
    ]
    until = time.monotonic() + seconds
    with ended(*processes):
        while any(process.is_alive() for process in processes):
            if any(process.exitcode for process in processes) or time.monotonic() > until:
                break
            multiprocessing.connection.wait([p.sentinel for p in processes if p.is_alive()], timeout=1)
        codes = [process.exitcode for process in processes]
    assert codes == [0] * count, (codes, *(file.read_text() for file in files))


@contextlib.contextmanager
def ended(*processes: ForkServerProcess) -> Iterator[None]:
    """Kill the processes at the end, if they still run."""
    try:
        yield
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _run(
    function: Callable[..., object],
    arguments: tuple[Any, ...],
    environment: Mapping[str, str],
    output: str,
    threads: int,
) -> None:
    if sys.platform == "linux":  # a test run that is killed leaves none behind
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(threads)
    gc.freeze()  # a training looks for what can be freed, and need not look at what was imported
    function(*arguments)


def enter(words: tuple[str, ...]) -> None:
    """What a process does that runs the command, for `group`."""
    from diptych.cli.main import main

    sys.exit(main(words))
