"""Look at this machine and this installation; exit code 1 when something does not work."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

GOOD, NOTE, BAD = "ok", "note", "FAIL"
Finding = tuple[str, str, str]
"""(verdict, what, what was found)."""

EXTRAS = {"data": ["datasets"], "eval": ["sklearn"], "dev": ["pytest", "ruff"]}
LEAST_MEMORY, LEAST_DISK = 4.0, 2.0
"""GiB that the quick start wants."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="do not load the shipped models")


def run(args: argparse.Namespace) -> int:
    worst = 0
    for verdict, what, detail in findings(quick=args.quick):
        print(f"[{verdict:^4}] {what:<16}{detail}", flush=True)
        worst = max(worst, int(verdict == BAD))
    print("something does not work; see the lines marked FAIL" if worst else "all that is needed works")
    return worst


def findings(*, quick: bool) -> Iterator[Finding]:
    """Everything that is looked at, in order."""
    yield from software()
    yield from machine()
    if not quick:
        yield from models()


def software() -> Iterator[Finding]:
    """Python, our requirements against their ranges, and the extras."""
    import importlib.metadata as metadata
    import platform
    import sys

    from packaging.requirements import Requirement

    fits = sys.version_info >= (3, 11)
    yield GOOD if fits else BAD, "python", f"{platform.python_version()} on {platform.platform(terse=True)}"
    yield GOOD, "diptych", metadata.version("diptych")
    required = [Requirement(line) for line in metadata.requires("diptych") or []]
    for package in required:
        if package.marker is not None:
            continue
        try:
            version = metadata.version(package.name)
        except metadata.PackageNotFoundError:
            yield BAD, package.name, f"not installed; needs {package.specifier}"
            continue
        good = package.specifier.contains(version, prereleases=True)
        yield GOOD if good else BAD, package.name, version if good else f"{version}, but {package.specifier} is needed"
    for extra, names in EXTRAS.items():
        missing = [name for name in names if not _installed(name)]
        detail = f"missing {', '.join(missing)}: pip install 'diptych[{extra}]'" if missing else "installed"
        yield NOTE if missing else GOOD, f"extra {extra}", detail


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def machine() -> Iterator[Finding]:
    """Devices, threads, memory, disk."""
    import os
    import shutil
    from pathlib import Path

    import torch

    x = torch.randn(64, 64)
    works = torch.allclose(x @ torch.eye(64), x)
    yield GOOD if works else BAD, "cpu", f"{torch.get_num_threads()} threads of {os.cpu_count()} processors"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            size = torch.cuda.get_device_properties(index).total_memory / 2**30
            yield GOOD, f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {size:.0f} GiB"
    elif torch.backends.mps.is_available():
        yield GOOD, "mps", "Apple GPU"
    else:
        yield NOTE, "gpu", "none; the toy models need none"
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 if hasattr(os, "sysconf") else 0.0
    if pages:
        yield GOOD if pages >= LEAST_MEMORY else NOTE, "memory", f"{pages:.1f} GiB"
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    yield GOOD if free >= LEAST_DISK else NOTE, "disk", f"{free:.1f} GiB free in {Path.cwd()}"


def models() -> Iterator[Finding]:
    """The shipped models load, and make an image or answer."""
    from PIL import Image
    from transformers.utils import logging as transformers_logging

    from diptych.core.errors import UserError
    from diptych.recipes.load import load
    from diptych.recipes.names import shipped

    transformers_logging.disable_progress_bar()
    names = shipped()
    if not names:
        yield BAD, "shipped models", "none found in the package; install it again"
    for name in names:
        try:
            engine = load(name)
            if "text_to_image" in engine.system.tasks:
                engine.generate("a red circle", steps=1)
                yield GOOD, name, "loads and draws"
            else:
                engine.ask(Image.new("RGB", (32, 32)), "how many circles are there?")
                yield GOOD, name, "loads and answers"
        except UserError as error:
            yield BAD, name, str(error)
