"""The process that `run.py` starts for each tree: it makes a case, and times a way of it for every line that it reads.

python benchmarks/worker.py CASE THREADS
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch

from cases import CASES
from measure import Peak


def main() -> None:
    name, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    answers = os.fdopen(os.dup(1), "w")  # what libraries print must not mix with it
    os.dup2(2, 1)
    torch.manual_seed(0)
    ways = CASES[name].make()
    print(json.dumps(sorted(ways)), file=answers, flush=True)
    memory = Peak("cpu")
    for line in sys.stdin:
        way = ways[line.strip()]
        cpu, wall = os.times().user, time.perf_counter()
        way()
        seconds = {"wall": time.perf_counter() - wall, "cpu": os.times().user - cpu, "mib": memory.rise() / 2**20}
        print(json.dumps(seconds), file=answers, flush=True)


if __name__ == "__main__":
    main()
