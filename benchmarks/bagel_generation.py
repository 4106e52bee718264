"""BAGEL's generation with cached contexts and batched guidance, against a loop that reads the context again each step.

    python benchmarks/bagel_generation.py [--steps 50] [--repeats 3]

At small width: 256 latent tokens, a prompt of 200 tokens with text guidance (two branches), and an edit with 1,000
context tokens with text and image guidance (three branches). The plain loop runs each branch by itself and each step
over the whole sequence, context and noise. Prints a table and a JSON line; ratios are of one run.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diptych.core.positions import grid_ids
from diptych.parts.backbones.mot import MoTConfig
from diptych.parts.backbones.siglip_navit import SigLIPConfig
from diptych.systems.bagel.context import Piece, condition, empty_context, latent_piece, read, text_piece, vision_piece
from diptych.systems.bagel.items import Item, Latent, Markers, pack
from diptych.systems.bagel.network import BagelNetwork, NetworkConfig

MARKERS = Markers(bos=0, eos=1, start_image=2, end_image=3)
SIDE = 16
"""Latent tokens along a side of the image to make."""


def network(width: int, layers: int) -> BagelNetwork:
    llm = MoTConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
    )
    vision = SigLIPConfig(
        hidden_size=width // 2,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=4,
        image_size=128,
    )
    torch.manual_seed(0)
    return BagelNetwork(NetworkConfig(llm=llm, vision=vision, latent_side=32)).eval()


def requests(net: BagelNetwork, kind: str) -> list[list[Piece]]:
    """Branches of a request: as it is, without its text, and (edits) its texts alone."""
    draws = torch.Generator().manual_seed(1)

    def text(count: int) -> Piece:
        return text_piece(torch.randint(4, 1000, (count - 2,), generator=draws).tolist())

    if kind == "prompt of 200":
        return [[text(200)], []]
    token, patch = net.config.token, 3 * net.config.vision.patch_size**2
    clean = latent_piece(torch.randn(256, token, generator=draws), 16, 16)
    seen = vision_piece(torch.randn(676, patch, generator=draws), 26, 26)
    words = text(64)  # 258 + 678 + 64 = 1,000
    return [[clean, seen, words], [clean, seen], [words]]


def cached(net: BagelNetwork, branches: Sequence[Sequence[Piece]], noise: Tensor, t: Tensor) -> Tensor:
    """Contexts read once, all branches of a step in one batch."""
    held = condition(read(net, MARKERS, [empty_context(net)] * len(branches), branches))
    count, places, x = len(branches), grid_ids(SIDE, SIDE, net.config.latent_side), noise
    for now, after in pairwise(t):
        v = net.query(x.repeat(count, 1, 1), now.repeat(count), places, held.starts, MARKERS, held.layers, held.lengths)
        x = x + (after - now) * combine(v.unbind(0))[None]
    return x


def plain(net: BagelNetwork, branches: Sequence[Sequence[Piece]], noise: Tensor, t: Tensor) -> Tensor:
    """The whole sequence of every branch at every step."""
    x = noise
    rows: list[tuple[list[Item], Sequence[Piece]]] = []
    for pieces in branches:
        items: list[Item] = [piece.item for piece in pieces]
        rows.append(([*items, Latent(rows=SIDE, columns=SIDE, noised=True)], pieces))
    for now, after in pairwise(t):
        found: list[Tensor] = []
        for items, pieces in rows:
            row = pack([items], MARKERS, net.sides())
            patches = [piece.patches for piece in pieces if piece.patches is not None]
            clean = [piece.latents for piece in pieces if piece.latents is not None]
            latents = torch.cat([*clean, x[0]])
            states = net.run(row, torch.cat(patches) if patches else None, latents, row.token_times(now[None]))
            found.append(net.port.leave(states.latent[-SIDE * SIDE :]))
        x = x + (after - now) * combine(found)[None]
    return x


def combine(v: Sequence[Tensor]) -> Tensor:
    guided = v[1] + 4.0 * (v[0] - v[1])
    return guided if len(v) == 2 else v[2] + 2.0 * (guided - v[2])


def seconds(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Processor time of this process, so that other work on the machine does not count, and the result."""
    start = time.process_time()
    out = run()
    return time.process_time() - start, out


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    from diptych.inference.solvers import times

    torch.set_num_threads(1)
    net = network(args.width, args.layers)
    torch.nn.init.normal_(net.port.proj_out.weight, std=0.02)
    noise = torch.randn(1, SIDE * SIDE, net.config.token)
    t = times(args.steps, 3.0)
    results: dict[str, dict[str, float]] = {}
    print(f"{'request':16} {'cached s':>9} {'plain s':>9} {'ratio':>6} {'difference':>11}")
    for kind in ("prompt of 200", "edit of 1000"):
        branches = requests(net, kind)
        fast, slow = [], []
        difference = 0.0
        for _ in range(args.repeats):
            a, x = seconds(lambda rows=branches: cached(net, rows, noise, t))
            b, y = seconds(lambda rows=branches: plain(net, rows, noise, t))
            fast.append(a)
            slow.append(b)
            difference = float((x - y).abs().max() / y.abs().max())
        row = {"cached": min(fast), "plain": min(slow), "ratio": min(slow) / min(fast), "difference": difference}
        results[kind] = row
        print(f"{kind:16} {row['cached']:9.2f} {row['plain']:9.2f} {row['ratio']:6.2f} {difference:11.1e}")
    setting = {"steps": args.steps, "width": args.width, "layers": args.layers, "latent_tokens": SIDE * SIDE}
    print(json.dumps({"benchmark": "bagel_generation", **setting, "results": results, **machine()}))


def machine() -> dict[str, object]:
    return {"processor": platform.processor() or platform.machine(), "threads": 1, "torch": torch.__version__}


if __name__ == "__main__":
    main()
