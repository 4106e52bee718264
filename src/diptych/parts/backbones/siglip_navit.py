"""SigLIP's vision tower over packed patches of images of any size (NaViT), as BAGEL uses it.

Source: SigLIP (Zhai et al. 2023, arXiv 2303.15343), NaViT packing (Dehghani et al. 2023, arXiv 2307.06304); BAGEL
(arXiv 2505.14683, Sec. 2.2). The patch embedding is a linear layer, positions come from a learned table of fixed side
(cells keep their row and column, the table is never stretched), attention stays inside an image, and the published
model leaves out SigLIP's last layer.

N patches of all images, V width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.core.errors import UserError
from diptych.core.patchify import patchify
from diptych.parts.layers import MLP, attend_segments


@dataclass(frozen=True, kw_only=True)
class SigLIPConfig:
    """Sizes of a `SigLIPNaViT`, by the names of SigLIP's configuration.

    num_hidden_layers: layers in use. side: of the position table, in patches; image_size / patch_size where None.
    init: deviation of random weights.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    image_size: int
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    init: float = 0.02

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise UserError(f"vision: {self.num_attention_heads} heads do not divide hidden_size {self.hidden_size}")

    @property
    def side(self) -> int:
        """Cells along a side of the position table."""
        return self.image_size // self.patch_size


class VisionLayer(nn.Module):
    """Pre-norm attention and MLP (GELU, tanh)."""

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """x (N, V); patches of an image see those of the same image."""
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.out_proj(attend_segments(q, k, v, lengths))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class SigLIPNaViT(nn.Module):
    """Patches of many images to their features."""

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.num_channels * config.patch_size**2
        self.patch_embedding = nn.Linear(patch, config.hidden_size)
        self.position_embedding = nn.Embedding(config.side**2, config.hidden_size)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every parameter, in place, on any device (a no-op on meta): normal matrices, zero biases, norms of one."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.init)
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
            if isinstance(module, nn.Linear | nn.LayerNorm):
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.position_embedding.weight, std=0.5)  # as large as what the patches bring

    def patches(self, image: Tensor) -> Tensor:
        """An image (3, H, W) as its patches (n, 3 P^2), channels fastest."""
        return patchify(image[None], self.config.patch_size, "pqc")[0]

    def forward(self, patches: Tensor, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Features (N, V) after the last norm.

        Args:
            patches: (N, 3 P^2) of all images. ids: (N,) places in the position table. lengths: patches of each image.
        """
        x = self.patch_embedding(patches) + self.position_embedding(ids)
        for layer in self.layers:
            x = layer(x, lengths)
        return self.post_norm(x)


class VisionConnector(MLP):
    """Vision features (N, V) into the language model's width (N, D): linear, GELU (tanh), linear."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out, out, names=("fc1", "fc2"))
        first, second = self.linears
        with torch.no_grad():  # image features come out as large as the positions that are added to them
            nn.init.normal_(first.weight, std=1.4 * width**-0.5)
            nn.init.normal_(second.weight, std=1.6 * out**-0.5)
