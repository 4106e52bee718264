"""BAGEL's network: what turns packed rows into states, and states into scores and velocities.

L tokens of a row, U understanding and G latent tokens of a run, D width, c numbers in a latent token, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diptych.checkpoints.deferred import active
from diptych.core.errors import UserError
from diptych.core.host import upload
from diptych.core.positions import sincos_table
from diptych.parts.backbones.attention import Kernel, KeyValue, PackAttention, RowAttention
from diptych.parts.backbones.mot import MoT, MoTConfig
from diptych.parts.backbones.siglip_navit import SigLIPConfig, SigLIPNaViT, VisionConnector
from diptych.parts.decoders.latent_port import LatentPort
from diptych.systems.bagel.items import Markers, Pack, Tables


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Sizes. latent_channels: of the autoencoder. latent_patch: side of a token in latent pixels. latent_side: of the
    latents' position table, in tokens. stretched: image positions are stretched over the tables."""

    llm: MoTConfig
    vision: SigLIPConfig
    latent_channels: int = 16
    latent_patch: int = 2
    latent_side: int = 64
    stretched: bool = False

    @property
    def token(self) -> int:
        """c."""
        return self.latent_channels * self.latent_patch**2


@dataclass
class States:
    """Post-norm states of a run: `text` (X, D) and `vision` (V, D), `latent` (N, D), and where asked for, each sample's
    keys and values by layer, its cached ones included."""

    text: Tensor
    vision: Tensor
    latent: Tensor
    kept: list[list[KeyValue]]

    def zero(self) -> Tensor:
        """A zero whose gradient reaches every parameter that the run used, as zeros."""
        return 0 * (self.text.float().sum() + self.vision.float().sum() + self.latent.float().sum())


class BagelNetwork(nn.Module):
    """Language model of two experts, vision tower and connector, and the port of the latents.

    The position tables are fixed; they are kept as buffers, since published files hold them.
    """

    latent_positions: Tensor
    vision_positions: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = config.llm.hidden_size
        if width % 4:
            raise UserError(f"llm: hidden_size {width} is no multiple of 4, which the position tables need")
        self.config = config
        self.llm = MoT(config.llm)
        self.vision = SigLIPNaViT(config.vision)
        self.connector = VisionConnector(config.vision.hidden_size, width)
        self.port = LatentPort(config.token, width)
        device = self.port.proj_in.weight.device
        for name, side in (("latent_positions", config.latent_side), ("vision_positions", config.vision.side)):
            empty = device.type == "meta" and active() is None
            table = torch.empty(side**2, width, device=device) if empty else sincos_table(width, side)
            self.register_buffer(name, table)

    @property
    def device(self) -> torch.device:
        return self.llm.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.embed_tokens.weight.dtype

    def sides(self) -> Tables:
        """Sizes of the position tables, for `items.pack`."""
        config = self.config
        return Tables(latent=config.latent_side, vision=config.vision.side, stretched=config.stretched)

    def run(
        self,
        pack: Pack,
        patches: Tensor | None,
        latents: Tensor | None,
        times: Tensor | None,
        *,
        past: Sequence[Sequence[KeyValue] | None] | None = None,
        keep: bool = False,
        kernel: Kernel = "auto",
    ) -> States:
        """One run over a packed row.

        Args:
            patches: (V, 3 P^2) of all vision images. latents: (N, c) noisy or clean latent tokens. times: (N,) of each.
            past: for each sample the keys and values that it continues. keep: give them back, grown.
        """
        text, vision, latent = self.embed(pack, patches, latents, times)
        und = torch.cat([text, vision])
        places = torch.cat([pack.text_places, pack.vision_places, pack.latent_places])
        ids = upload(pack.positions[places], self.device)
        attention = PackAttention(pack.layout(), self.device, past=past, keep=keep, kernel=kernel)
        und, gen = self.llm(und, latent, ids, attention)
        return States(text=und[: len(text)], vision=und[len(text) :], latent=gen, kept=attention.kept)

    def embed(
        self, pack: Pack, patches: Tensor | None, latents: Tensor | None, times: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What enters the first layer: text (X, D), vision (V, D) and latent (N, D) tokens."""
        text = self.llm.embed_tokens(upload(pack.text_ids, self.device))
        vision = latent = text.new_zeros(0, text.shape[1])
        if patches is not None:
            vision = self.see(patches, pack.vision_ids, pack.vision_lengths).to(text.dtype)
        if latents is not None and times is not None:
            latent = self.enter(latents, times, pack.latent_ids).to(text.dtype)
        return text, vision, latent

    def see(self, patches: Tensor, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Patches (V, 3 P^2) to vision tokens (V, D)."""
        ids = upload(ids, self.device)
        features = self.vision(patches.to(self.device, self.dtype), ids, lengths)
        return self.connector(features) + self.vision_positions[ids]

    def enter(self, latents: Tensor, times: Tensor, ids: Tensor) -> Tensor:
        """Latent tokens (N, c) of times (N,) and places (N,) to model tokens (N, D)."""
        places = self.latent_positions[upload(ids, self.device)]
        return self.port.enter(latents.to(self.device, self.dtype), times, places)

    def query(
        self,
        latents: Tensor,
        times: Tensor,
        places: Tensor,
        starts: Tensor,
        markers: Markers,
        past: Sequence[KeyValue],
        lengths: Sequence[int],
    ) -> Tensor:
        """Predictions for noisy latents of B rows beside their caches, which are not written to; (B, N, c).

        Args:
            latents: (B, N, c). times: (B,). places: (N,) in the latent table. starts: (B,) rotary id of each row.
            past: keys and values by layer, each (B, K, S, d). lengths: real tokens of each row.
        """
        batch, count, _ = latents.shape
        around = upload(torch.tensor([markers.start_image, markers.end_image]), self.device).repeat(batch)
        und = self.llm.embed_tokens(around)  # (2 B, D)
        times = times[:, None].expand(batch, count).flatten()
        gen = self.enter(latents.flatten(0, 1), times, places.repeat(batch)).to(und.dtype)
        ids = torch.cat([starts[:, None].expand(batch, each).flatten() for each in (2, count)])
        _, hidden = self.llm(und, gen, ids, RowAttention(batch, 2, past, lengths=lengths))
        return self.port.leave(hidden).unflatten(0, (batch, count))
