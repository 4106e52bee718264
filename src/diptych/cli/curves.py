"""Draw the losses of runs by step, finished or not: lines in training, points on held-out data.

diptych curves runs/toy-ovis-u1 -o curves.png
"""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder; several are drawn over each other")
    parser.add_argument(
        "-o", "--output", "--out", metavar="FILE", default="curves.png", help="the picture (curves.png)"
    )


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from diptych.reports.curves import plot, read

    folders = [Path(name).expanduser() for name in args.runs]
    output = Path(args.output).expanduser()
    plot({str(name): read(folder) for name, folder in zip(args.runs, folders, strict=True)}, output)
    print(output)
    return 0
