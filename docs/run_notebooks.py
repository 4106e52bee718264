"""Run the notebooks of the documentation and write what their cells gave: python docs/run_notebooks.py [NAME...]."""

from __future__ import annotations

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


def main(chosen: list[str]) -> None:
    for name in chosen or names():
        nbformat.write(run(name), FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main(sys.argv[1:])
