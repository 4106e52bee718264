"""Releases that are pickles (*.pth), converted once: a process of its own reads the file and writes safetensors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from diptych.checkpoints import read_pickle
from diptych.core.errors import UserError
from diptych.core.files import write_file

_NAMED = re.compile(r"(?:Unsupported (?:global|class|operand|persistent id)|GLOBAL) ?:?\W*([\w.]+)")


def reason(said: str) -> str:
    """What kept PyTorch from reading a file, without its advice to run what the file holds."""
    if "Weights only load failed" in said:
        named = _NAMED.search(said)
        what = f"it asks for {named[1]}, and" if named else "it asks for more than tensors, which"
        return f"{what} nothing that a file asks for is run"
    last = (said.strip().splitlines() or ["the process that read it was stopped"])[-1]
    return "not a file of weights" if last.strip().isdigit() or ("Error" not in last and ":" not in last) else last


def to_safetensors(source: Path, target: Path) -> None:
    """Write the tensors of a pickle file as safetensors; `target` appears whole or not at all.

    The file is read with `weights_only` by an isolated interpreter, which knows neither this process's modules nor its
    environment. It needs memory for the weights once more.

    Raises:
        UserError: no such file, or one that is no mapping of names to tensors.
    """
    if not source.is_file():
        raise UserError(f"{source}: no such file")

    def write(place: Path) -> None:
        program = [sys.executable, "-I", read_pickle.__file__, str(source.resolve()), str(place.resolve())]
        ran = subprocess.run(program, env={}, capture_output=True, text=True, check=False)
        if ran.returncode:
            why = ran.stderr.strip() if ran.returncode == read_pickle.NOT_WEIGHTS else reason(ran.stderr)
            raise UserError(f"{source}: not readable as weights ({why})")

    write_file(target, write)
