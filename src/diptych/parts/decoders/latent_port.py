"""Where latents enter and leave a language model that makes images itself (BAGEL, arXiv 2505.14683, Sec. 2.2).

N latent tokens, c numbers in a token, D width of the language model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diptych.core.host import on_host, upload
from diptych.parts.layers import TimeEmbedding


class LatentPort(nn.Module):
    """Noisy latent tokens in, predictions out.

    A token enters as its projection, plus the embedding of its time (of 0 for an image that is read), plus the vector
    of its place. The way out starts at zero.
    """

    def __init__(self, token: int, width: int) -> None:
        super().__init__()
        self.time = TimeEmbedding(width, factor=1.0, names=("fc1", "fc2"))
        self.proj_in = nn.Linear(token, width)
        self.proj_out = nn.Linear(width, token)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every parameter, in place, on any device (a no-op on meta)."""
        for linear in self.time.linears:
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.xavier_uniform_(self.proj_in.weight)
        nn.init.zeros_(self.proj_in.bias)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def enter(self, tokens: Tensor, t: Tensor, places: Tensor) -> Tensor:
        """tokens (N, c), t (N,), vectors of their places (N, D); (N, D). Each distinct time is embedded once."""
        moments, which = (upload(x, tokens.device) for x in on_host(t).unique(return_inverse=True))
        return self.proj_in(tokens) + self.time(moments)[which] + places

    def leave(self, hidden: Tensor) -> Tensor:
        """Post-norm states (N, D) to predictions (N, c)."""
        return self.proj_out(hidden)
