"""Layers that several parts share, each written once: RMS norm, MLPs, the embedding of times, attention.

Published checkpoints name the same layer in many ways, so the names of a layer's projections are an argument, and the
state-dict keys of each part stay those of its release.

B batch, T tokens, W width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.core.host import upload
from diptych.core.positions import time_waves
from diptych.parts.written_backward import made_again, rms_norm, silu_times

WAVES = 256
"""Sinusoids that a time becomes before its MLP."""


class RMSNorm(nn.RMSNorm):
    """RMS norm over the last axis; its weight follows the input's dtype, so that autocast keeps the fused kernel."""

    eps: float  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps)

    def times(self, x: Tensor, scale: Tensor) -> Tensor:
        """The norm of x (B, T, W) times `scale` (B, 1, W), in one pass over memory fewer."""
        return rms_norm(x, None, self.eps) * (self.weight * scale).to(x.dtype)

    def gated(self, x: Tensor, gate: Tensor, added: Tensor) -> Tensor:
        """x (B, T, W) + `gate` (B, 1, W) times the norm of `added` (B, T, W)."""
        normed = rms_norm(added, None, self.eps)
        return torch.addcmul(x, (self.weight * gate).to(x.dtype), normed)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    """Linear, activation, linear, from `width` over `inner` to `out` (`width` where it is not given).

    Args:
        names: of the two linear layers.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        out: int | None = None,
        *,
        activation: Callable[[Tensor], Tensor] = gelu,
        names: tuple[str, str] = ("up", "down"),
    ) -> None:
        super().__init__()
        self.activation, self.names = activation, names
        self.add_module(names[0], nn.Linear(width, inner))
        self.add_module(names[1], nn.Linear(inner, width if out is None else out))

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """Both linear layers, the first one first."""
        modules: Any = self._modules
        return modules[self.names[0]], modules[self.names[1]]

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.linears
        return made_again(down, self.activation, up(x))


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): down(SiLU(gate x) * up x).

    Args:
        names: of gate, up and down.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        *,
        bias: bool = False,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> None:
        super().__init__()
        self.names = names
        self.add_module(names[0], nn.Linear(width, inner, bias=bias))
        self.add_module(names[1], nn.Linear(width, inner, bias=bias))
        self.add_module(names[2], nn.Linear(inner, width, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self._modules[name] for name in self.names)
        return made_again(down, silu_times, gate(x), up(x))  # type: ignore[misc,arg-type]


class TimeEmbedding(MLP):
    """Times (B,) in [0, 1] to (B, W): 256 sinusoids of `factor` t (cosines first), then a two-layer MLP with SiLU."""

    def __init__(self, width: int, *, factor: float = 1000.0, names: tuple[str, str] = ("mlp_in", "mlp_out")) -> None:
        super().__init__(WAVES, width, width, activation=F.silu, names=names)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        waves = time_waves(self.factor * x.float(), WAVES)  # (B, 256)
        return super().forward(waves.to(self.linears[0].weight.dtype))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of heads, each (B, T, H, K); (B, T, H K). mask: (B, 1, 1, T) bool, True where a key is real."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def attend_segments(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Softmax attention of packed heads (T, H, K) inside segments of these lengths, (T, H K).

    Segments of one length run together, so that no mask, no padding and no special kernel is needed.
    """
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    out = torch.empty_like(q)
    for length in dict.fromkeys(lengths):
        chosen = [start for start, other in zip(starts, lengths, strict=False) if other == length]
        if len(chosen) * length == len(q):
            index: Tensor | slice = slice(None)
        else:
            index = (torch.tensor(chosen)[:, None] + torch.arange(length)).flatten()
            index = upload(index, q.device)
        query, keys, values = (x[index].unflatten(0, (len(chosen), length)).transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(0, 1)  # (n length, H, K)
        if isinstance(index, slice):
            return mixed.flatten(1)
        out = out.index_copy(0, index, mixed)
    return out.flatten(1)


class Attention(nn.Module):
    """Self-attention with a projection each for queries, keys and values.

    Args:
        kv_heads: heads of keys and values, which groups of query heads share; H where it is not given.
        names: of the projections of queries, keys and values, and of the output.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        bias: bool = True,
        out_bias: bool = True,
        names: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "out_proj"),
    ) -> None:
        super().__init__()
        self.head, self.names = width // heads, names
        self.shared = heads // (kv_heads or heads)
        for name in names[:3]:
            count = heads if name == names[0] else kv_heads or heads
            self.add_module(name, nn.Linear(width, count * self.head, bias=bias))
        self.add_module(names[3], nn.Linear(width, width, bias=out_bias))

    def place(self, q: Tensor, k: Tensor, turn: Any) -> tuple[Tensor, Tensor]:
        """Queries and keys, normed and turned by their positions; as they are where a model does neither."""
        return q, k

    def forward(self, x: Tensor, turn: Any = None, mask: Tensor | None = None, first: int | None = None) -> Tensor:
        """x (B, T, W). turn: what `place` reads. mask: (B, 1, 1, T) bool, True where a key is real. first: how many
        tokens are wanted, all by default."""
        to_q, to_k, to_v, to_out = (self._modules[name] for name in self.names)
        sources = ((x[:, :first], to_q), (x, to_k), (x, to_v))
        q, k, v = (linear(tokens).unflatten(-1, (-1, self.head)) for tokens, linear in sources)  # type: ignore[misc]
        q, k = self.place(q, k, turn)  # (B, T, H, K) and (B, T, H / shared, K)
        if self.shared > 1:  # fused kernels with a mask want as many heads of keys as of queries
            k, v = (heads.repeat_interleave(self.shared, dim=2) for heads in (k, v))
        return to_out(attend(q, k, v, mask))  # type: ignore[misc]


@torch.no_grad()
def init_xavier(part: nn.Module) -> None:
    """Linear layers Xavier-uniform with zero biases, norms one; in place, on any device, and a no-op on meta."""
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.reset_parameters()
