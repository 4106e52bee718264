"""Two evaluations side by side: the difference of every shared task, with a 95% interval over paired items."""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="RUN", help="folder that diptych eval --output wrote")
    parser.add_argument("second", metavar="RUN", help="another; differences are second minus first")


def run(args: argparse.Namespace) -> int:
    import math
    from pathlib import Path

    from diptych.evaluation.compare import compare

    first, second = Path(args.first).expanduser(), Path(args.second).expanduser()
    for number, comparison in enumerate(compare(first, second)):
        if not number:
            print(f"first:  {comparison.models[0]} ({first})\nsecond: {comparison.models[1]} ({second})")
        print(f"{comparison.task:<20}{'first':>9}{'second':>9}{'change':>9}{'95% interval':>20}")
        for name, (before, after, change, low, high) in comparison.rows.items():
            spread = "-" if math.isnan(low) else f"{low:+.3f} to {high:+.3f}"
            clear = " *" if low > 0 or high < 0 else ""
            print(f"  {name:<18}{before:>9.3f}{after:>9.3f}{change:>+9.3f}{spread:>20}{clear}")
        print(f"  {comparison.items} items in both", end="")
        print(
            f"; {comparison.only_first} and {comparison.only_second} in one alone"
            if comparison.only_first or comparison.only_second
            else ""
        )
        for warning in comparison.warnings:
            print(f"  not alike: {warning}")
    print("* the interval leaves out zero")
    return 0
