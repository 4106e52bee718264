"""A process that has everything imported and forks a child for each command, below the layer of `interpose.c`.

Reads jobs as lines of JSON on its input and answers with lines of JSON. It starts no thread, so that a child of it is
like a new process.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import pkgutil
import resource
import select
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

LIBRARY = ctypes.CDLL(None)
OTHERS = ("diptych.serving", "diptych.page", "diptych.recipes.lmms", "diptych.__main__")
"""Modules that no command here uses; some start threads when they are imported."""


def serve(model: str) -> None:
    """Answer jobs until the input ends."""
    import torch

    torch.set_num_threads(1)
    from PIL import Image

    import diptych
    from diptych.recipes.load import load

    for module in pkgutil.walk_packages(diptych.__path__, "diptych."):
        if not module.name.startswith(OTHERS):
            importlib.import_module(module.name)
    for name in ("matplotlib.pyplot", "jinja2", "transformers", "tokenizers", "accelerate", "einops._torch_specific"):
        importlib.import_module(name)
    Image.init()
    load(model)
    gc.freeze()  # a collection in a child need not look at all that is here, and copy its pages
    assert len(os.listdir("/proc/self/task")) == 1, "a fork takes one thread along"
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        jobs = json.loads(line)
        children = [start(job) for job in jobs]
        print(json.dumps([end(job, *child) for job, child in zip(jobs, children, strict=True)]), flush=True)


def start(job: dict[str, Any]) -> tuple[int, int]:
    """A child that runs the job's command; its id, and where it writes how many operations it counted."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    code = 99
    try:
        for number, end in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{job['log']}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        os.chdir(job["cwd"])
        os.environ.update(job.get("env", {}))
        if job.get("largest") is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest"], job["largest"]))
        from diptych.cli.main import main

        at, error, lasting = job.get("at", 0), job.get("error", 0), int(job.get("lasting", False))
        record = str(job.get("record", "")).encode()
        if (reads := job.get("reads")) is not None:
            LIBRARY.faults_arm_reads(os.fsencode(reads["folder"]), ctypes.c_long(reads["at"]), reads["error"])
        LIBRARY.faults_arm(os.fsencode(job["root"]), ctypes.c_long(at), error, lasting, record)
        code = main(job["argv"])
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        LIBRARY.faults_count.restype = ctypes.c_long
        os.write(writer, str(LIBRARY.faults_count()).encode())
        os._exit(code)


def end(job: dict[str, Any], child: int, reader: int) -> dict[str, Any]:
    """How a child ended."""
    _, status = os.waitpid(child, 0)
    ready, _, _ = select.select([reader], [], [], 20)  # its children hold the other end too
    count = os.read(reader, 64) if ready else b""
    os.close(reader)
    said = {end: Path(f"{job['log']}.{end}").read_text(errors="replace") for end in ("out", "err")}
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "count": int(count or 0), "orphans": not ready, **said}


if __name__ == "__main__":
    serve(sys.argv[1])
