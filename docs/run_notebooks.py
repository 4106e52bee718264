"""Run the notebooks of the documentation and write what their cells gave.

python docs/run_notebooks.py [--output FOLDER] [NAME...]; without a folder they are written in place.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "notebooks"


def names() -> list[str]:
    """The notebooks of the documentation."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def run(name: str) -> Any:
    """A notebook with what its cells give now; progress bars and warnings of libraries are left out.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell ended in an exception.
    """
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    # `!diptych` in a cell is the command of this Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}})
    client.execute(env={**os.environ, "PATH": path})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)  # times of this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("names", nargs="*", default=names())
    options = parser.parse_args(words)
    for name in options.names:
        nbformat.write(run(name), options.output / f"{name}.ipynb")


if __name__ == "__main__":
    main(sys.argv[1:])
