"""How the toy world's detector reads the renderer's own images: true in rows, read in columns."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=500, help="scenes (500)")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels (32)")
    parser.add_argument("--noise", type=float, default=0.0, help="deviation of Gaussian noise added in [-1, 1] (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (0)")


def run(args: argparse.Namespace) -> int:
    from diptych.core.errors import UserError
    from diptych.toyworld.confusions import confusions

    if args.count < 1:
        raise UserError(f"--count must be at least 1, not {args.count}")
    if not 0 <= args.noise < 100:
        raise UserError(f"--noise must be from 0 to below 100, not {args.noise}")
    if not 8 <= args.size <= 4096:
        raise UserError(f"--size must be from 8 to 4096, not {args.size}")
    result = confusions(args.count, args.seed, size=args.size, noise=args.noise)
    for title, names, counts in (
        ("shapes", result.shape_names, result.shapes),
        ("colours", result.colour_names, result.colours),
        ("backgrounds", result.background_names, result.backgrounds),
    ):
        print("\n".join(table(title, names, counts.tolist())) + "\n")
    print(f"{result.objects} objects in {args.count} scenes: {result.missed} missed, {result.extra} extra")
    print(f"scenes read without any error: {result.exact:.4f}")
    return 0


def table(title: str, names: Sequence[str], counts: list[list[Any]]) -> list[str]:
    """A confusion matrix as lines; the last column counts what was missed."""
    columns = [*names, "missed"]
    width = max(len(name) for name in (title, *columns)) + 2
    lines = ["".join(f"{name:>{width}}" for name in (title, *columns))]
    for name, row in zip(names, counts, strict=True):
        lines.append(f"{name:>{width}}" + "".join(f"{value or '.':>{width}}" for value in row))
    return lines
