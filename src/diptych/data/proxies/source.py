"""Proxy tasks as a source of ordinary edits: a picture, a short instruction, and the picture wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from diptych.core.draws import key
from diptych.core.errors import UserError
from diptych.core.sample import Sample
from diptych.data.proxies.annotated import Pictures, View, view
from diptych.data.proxies.tasks import PROXIES, Proxy, shares
from diptych.data.source import ItemDraws, Size, Source, check_task, describe


class ProxySource(Source):
    """One sample per picture.

    Which proxy a picture is used for, its colours and what is done to it are functions of (seed, id of the picture)
    alone; of the instructions each visit draws one.

    Args:
        pictures: where they come from.
        proxies: a proxy, a mixture, or weights by name.
        task: `edit`; no other can be served.

    Raises:
        UserError: a proxy needs what is not known of these pictures.
    """

    def __init__(
        self, pictures: Pictures, *, proxies: str | Mapping[str, float], seed: int = 0, task: str = "edit",
        name: str = "proxies",
    ) -> None:  # fmt: skip
        self.name = name
        self.task = check_task(task, ("edit",), name)
        self.pictures = pictures
        self.seed = seed
        self.shares = shares(proxies, name)
        self.dropped: Mapping[str, str] = pictures.dropped
        for proxy in self.shares:
            missing = PROXIES[proxy].needs - pictures.known
            if missing:
                raise UserError(
                    f"{name}: {proxy!r} needs {', '.join(sorted(missing))}, and these pictures come with "
                    f"{', '.join(sorted(pictures.known)) or 'nothing but themselves'}"
                )

    def __len__(self) -> int:
        return len(self.pictures)

    def load(self, index: int, draws: ItemDraws, size: Size) -> Sample:
        id = self._id(index)
        proxy = self.proxy(index)
        seen, wanted = made(proxy, view(self.pictures.load(index, size), size, id), key(self.seed, id, proxy.name))
        return Sample(
            id=id,
            task=self.task,
            image=wanted,
            text=proxy.instructions[draws.integer("text", len(proxy.instructions))],
            context_images=(seen,),
            extra={"proxy": proxy.name},
        )

    def proxy(self, index: int) -> Proxy:
        """The task that picture `index` is used for."""
        place = key(self.seed, self._id(index), "proxy") / 2**63
        for name, share in self.shares.items():
            place -= share
            if place < 0:
                return PROXIES[name]
        return PROXIES[next(reversed(self.shares))]  # rounding

    def sizes(self) -> Sequence[Size | None] | None:
        return self.pictures.sizes()

    def fingerprint(self, index: int) -> str:
        return f"{self.proxy(index).name}:{self.seed}:{self.pictures.stamp(index)}"

    def describe(self) -> str:
        parts = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        return f"{describe(self)}, {parts}, seed {self.seed}"

    def _id(self, index: int) -> str:
        return f"{self.name}/{self.pictures.id(index)}"


def made(proxy: Proxy, seen: View, seed: int) -> tuple[Tensor, Tensor]:
    """A proxy's pair as tensors (3, H, W) in [-1, 1]: what is read, what is wanted."""
    source, target = proxy.make(seen, np.random.Generator(np.random.PCG64(seed)))
    assert source.shape == target.shape == seen.image.shape
    return to_tensor(source), to_tensor(target)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 to float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1).contiguous().div_(127.5).sub_(1.0)
