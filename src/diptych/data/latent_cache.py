"""Autoencoder latents kept on disk, one safetensors file each, under a key that any change invalidates."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import get_worker_info

from diptych.core.errors import UserError
from diptych.core.files import write_bytes
from diptych.core.sample import Sample
from diptych.data.source import BadItem, ItemDraws, Size, Source
from diptych.parts.autoencoders.base import Autoencoder

logger = logging.getLogger(__name__)


def autoencoder_fingerprint(autoencoder: Autoencoder, config: Mapping[str, Any]) -> str:
    """A digest of the class, `config` (plain JSON values, scale and shift among them) and every weight and buffer."""
    digest = hashlib.blake2b(digest_size=16)
    head = [type(autoencoder).__qualname__, autoencoder.channels, autoencoder.factor, dict(config)]
    digest.update(json.dumps(head, sort_keys=True, default=str).encode())
    for name, tensor in sorted(autoencoder.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class CachedLatents(Source):
    """A source whose samples carry the latent of their target image.

    A latent is read from `folder` or, when it is not there, computed and written. Its key is made of the item's id and
    fingerprint (file size and time, fit), the size and the autoencoder's fingerprint. Images are encoded one by one, so
    a latent does not depend on what it was computed with.

    Args:
        source: of any task with target images.
        folder: made when the first latent is written; may serve several sources and autoencoders.
        autoencoder: frozen, on any device.
        config: of the autoencoder, what its weights do not hold.

    Raises:
        UserError: the task has no target image; a full disk or an unwritable folder (on load).
    """

    def __init__(
        self, source: Source, folder: str | Path, autoencoder: Autoencoder, config: Mapping[str, Any] | None = None
    ) -> None:
        if source.task == "understand":
            raise UserError(f"{source.name}: task 'understand' has no target image, so there are no latents to cache")
        self.source = source
        self.folder = Path(folder).expanduser()
        self.autoencoder = autoencoder
        self.config = dict(config or {})
        self.name, self.task, self.dropped = source.name, source.task, source.dropped

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int, draws: ItemDraws, size: Size) -> Sample:
        sample = self.source.load(index, draws, size)
        path = self.path(index, sample.id, size)
        latent = _read(path)
        if latent is None:
            latent = self._encode(sample)
            write_bytes(path, [safetensors.torch.save({"latent": latent}, {"id": sample.id})])
        return replace(sample, latent=latent)

    def fill(self, size: Size, progress: Callable[[int], None] | None = None) -> int:
        """Computes the latent of every item at `size` that has none yet; gives the number of bad items passed over.

        Args:
            progress: called with the number of items done.
        """
        bad = 0
        for index in range(len(self)):
            try:
                self.load(index, ItemDraws(0), size)
            except BadItem:
                bad += 1
            if progress is not None:
                progress(index + 1)
        return bad

    def path(self, index: int, id: str, size: Size) -> Path:
        """Where the latent of an item is kept."""
        parts = json.dumps([id, self.source.fingerprint(index), list(size), self._autoencoder_fingerprint])
        digest = hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()
        return self.folder / digest[:2] / f"{digest[2:]}.safetensors"

    def sizes(self) -> Sequence[Size | None] | np.ndarray | None:
        return self.source.sizes()

    def fingerprint(self, index: int) -> str:
        return self.source.fingerprint(index)

    def describe(self) -> str:
        return f"{self.source.describe()}; latents cached in {self.folder}"

    @cached_property
    def _autoencoder_fingerprint(self) -> str:
        return autoencoder_fingerprint(self.autoencoder, self.config)

    def _encode(self, sample: Sample) -> Tensor:
        assert sample.image is not None
        weights = [*self.autoencoder.parameters(), *self.autoencoder.buffers()]
        device = weights[0].device if weights else torch.device("cpu")
        if device.type != "cpu" and get_worker_info() is not None:
            raise UserError(
                f"{sample.id}: no cached latent, and a worker process cannot use {device}; fill the cache first, or "
                "load without workers"
            )
        with torch.no_grad():
            return self.autoencoder.encode(sample.image[None].to(device))[0].contiguous().cpu()  # (C, h, w)


def _read(path: Path) -> Tensor | None:
    """The latent at `path`; None when there is none, or only a damaged one."""
    try:
        return safetensors.torch.load(path.read_bytes())["latent"]
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, ValueError) as error:
        logger.warning("%s: damaged latent, computed anew (%s)", path, error)
        return None
    except OSError as error:
        raise UserError(f"{path}: cached latent not readable ({error.strerror})") from error
