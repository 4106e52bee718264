from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diptych.core.errors import UserError
from diptych.data.folder import FolderSource
from diptych.data.latent_cache import CachedLatents, autoencoder_fingerprint
from diptych.data.source import ItemDraws
from diptych.data.toyworld import ToyWorldSource
from diptych.parts.autoencoders.base import Autoencoder

DRAWS = ItemDraws(0)


class Halves(Autoencoder):
    channels, factor = 3, 2

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.calls = 0

    def encode(self, images: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.avg_pool2d(images, 2) * self.scale

    def decode_pass(self, latents: Tensor) -> Tensor:
        return latents


@pytest.fixture
def source(tmp_path: Path) -> FolderSource:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (20, 20), (80 * number, 0, 0)).save(folder / f"{number}.png")
    return FolderSource(folder)


def test_latent_is_computed_once_and_equal(source: FolderSource, tmp_path: Path) -> None:
    autoencoder = Halves()
    cached = CachedLatents(source, tmp_path / "cache", autoencoder)
    first = cached.load(1, DRAWS, (8, 8))
    again = CachedLatents(source, tmp_path / "cache", autoencoder).load(1, DRAWS, (8, 8))
    assert autoencoder.calls == 1
    assert first.image is not None
    assert first.latent is not None
    assert again.latent is not None
    assert torch.equal(first.latent, autoencoder.encode(first.image[None])[0])
    assert torch.equal(first.latent, again.latent)
    assert not first.latent.requires_grad
    assert np.array_equal(cached.sizes(), source.sizes())
    assert len(cached) == 3


def test_every_change_invalidates(source: FolderSource, tmp_path: Path) -> None:
    autoencoder = Halves()
    folder = tmp_path / "cache"

    def calls(cached: CachedLatents, size: tuple[int, int] = (8, 8)) -> int:
        before = autoencoder.calls
        cached.load(0, DRAWS, size)
        return autoencoder.calls - before

    assert calls(CachedLatents(source, folder, autoencoder)) == 1
    assert calls(CachedLatents(source, folder, autoencoder)) == 0
    assert calls(CachedLatents(source, folder, autoencoder), (8, 12)) == 1
    assert calls(CachedLatents(FolderSource(source.folder, fit="letterbox"), folder, autoencoder)) == 1
    assert calls(CachedLatents(source, folder, autoencoder, {"shift": 0.5})) == 1
    autoencoder.scale.data += 1
    assert calls(CachedLatents(source, folder, autoencoder)) == 1
    Image.new("RGB", (21, 20), "blue").save(source.folder / "0.png")
    assert calls(CachedLatents(source, folder, autoencoder)) == 1
    assert calls(CachedLatents(source, folder, autoencoder)) == 0


def test_fill_passes_over_bad_items(source: FolderSource, tmp_path: Path) -> None:
    (source.folder / "1.png").write_bytes(b"junk")
    autoencoder = Halves()
    cached = CachedLatents(source, tmp_path / "cache", autoencoder)
    done: list[int] = []
    assert cached.fill((8, 8), done.append) == 1
    assert done == [1, 2, 3]
    assert autoencoder.calls == 2
    assert cached.fill((8, 8)) == 1
    assert autoencoder.calls == 2


def test_a_damaged_latent_is_made_anew(source: FolderSource, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached = CachedLatents(source, tmp_path / "cache", Halves())
    whole = cached.load(0, DRAWS, (8, 8)).latent
    path = cached.path(0, "photos/0.png", (8, 8))
    path.write_bytes(path.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        again = cached.load(0, DRAWS, (8, 8)).latent
    assert whole is not None
    assert again is not None
    assert torch.equal(whole, again)
    assert "damaged latent" in caplog.text


def test_full_disk_is_one_clear_error(source: FolderSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"No space left on device.*free space"):
        CachedLatents(source, tmp_path / "cache", Halves()).load(0, DRAWS, (8, 8))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_unwritable_folder(source: FolderSource, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot be written|not readable"):
        CachedLatents(source, tmp_path / "file", Halves()).load(0, DRAWS, (8, 8))


def test_conversations_have_no_latents(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no target image"):
        CachedLatents(ToyWorldSource(task="understand", count=2), tmp_path, Halves())


def test_fingerprint_of_the_autoencoder() -> None:
    assert autoencoder_fingerprint(Halves(), {}) == autoencoder_fingerprint(Halves(), {})
    assert autoencoder_fingerprint(Halves(), {}) != autoencoder_fingerprint(Halves().bfloat16(), {})
