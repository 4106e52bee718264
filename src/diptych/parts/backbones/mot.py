"""A mixture of transformers: a Qwen2.5-type language model whose layers hold two experts that share attention.

Source: BAGEL (arXiv 2505.14683, Sec. 2.2); Liang et al. 2024 (arXiv 2411.04996) for the idea. Text, image markers and
vision tokens go through the understanding expert, latent tokens and only those through the generation expert: norms,
projections, head norms and MLP are all double, and all tokens of a sample meet in one attention.

U understanding tokens, G generation tokens, T = U + G, D width, H query heads, K key/value heads, d head width.

The tokens of a run come as two tensors, (U, D) and (G, D), so that no layer has to sort them; how they stand to each
other is known to `attend` alone (`diptych.parts.backbones.attention`), which sees them in the order [understanding,
generation].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diptych.core.errors import UserError
from diptych.core.rope import line_rotation, rotate_halves
from diptych.parts.layers import RMSNorm
from diptych.parts.written_backward import made_again, silu_times

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries (T, H, d), keys (T, K, d), values (T, K, d)) to attended values (T, H, d)."""

Turn = tuple[Tensor, Tensor]
"""Cosine and sine of every token's rotary angles, each (T, d)."""


@dataclass(frozen=True, kw_only=True)
class MoTConfig:
    """Sizes of a `MoT`, by the names of Qwen2's configuration.

    tied: one matrix embeds tokens and scores them. init: deviation of random weights.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32_768
    tied: bool = False
    init: float = 0.02

    def __post_init__(self) -> None:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads or (self.hidden_size // heads) % 2:
            raise UserError(f"llm: hidden_size {self.hidden_size} does not give {heads} heads of even width")
        if heads % groups:
            raise UserError(f"llm: {heads} query heads do not share {groups} key/value heads evenly")

    @property
    def head(self) -> int:
        return self.hidden_size // self.num_attention_heads


class Expert(nn.Module):
    """One expert's half of a layer: all of it but the attention."""

    def __init__(self, config: MoTConfig) -> None:
        super().__init__()
        width, head, eps = config.hidden_size, config.head, config.rms_norm_eps
        self.head = head
        self.input_norm = RMSNorm(width, eps)
        self.q_proj = nn.Linear(width, config.num_attention_heads * head)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head)
        self.q_norm = RMSNorm(head, eps)
        self.k_norm = RMSNorm(head, eps)
        self.o_proj = nn.Linear(config.num_attention_heads * head, width, bias=False)
        self.post_norm = RMSNorm(width, eps)
        self.gate_proj = nn.Linear(width, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(width, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, width, bias=False)

    def project(self, x: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Turned queries (N, H, d) and keys, and values (N, K, d), of tokens (N, D)."""
        x = self.input_norm(x)
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head)))
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head)))
        v = self.v_proj(x).unflatten(-1, (-1, self.head))
        return rotate_halves(q, turn), rotate_halves(k, turn), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Tokens (N, D) after what attention gave them, (N, H, d), and the MLP."""
        x = x + self.o_proj(attended.flatten(1))
        h = self.post_norm(x)
        return x + made_again(self.down_proj, silu_times, self.gate_proj(h), self.up_proj(h))


class MoTLayer(nn.Module):
    """Two experts that meet in one attention. An expert without tokens runs in training only, so that every step has
    the same graph."""

    def __init__(self, config: MoTConfig) -> None:
        super().__init__()
        self.und = Expert(config)
        self.gen = Expert(config)

    def forward(self, und: Tensor, gen: Tensor, turn: Turn, attend: Attend, layer: int) -> tuple[Tensor, Tensor]:
        """und (U, D), gen (G, D), turn of all T in that order."""
        count, idle = und.shape[0], not torch.is_grad_enabled()
        if idle and gen.shape[0] == 0:
            return self.und.finish(und, attend(layer, *self.und.project(und, turn))), gen
        first = self.und.project(und, (turn[0][:count], turn[1][:count]))
        second = self.gen.project(gen, (turn[0][count:], turn[1][count:]))
        q, k, v = (torch.cat(pair) for pair in zip(first, second, strict=True))
        attended = attend(layer, q, k, v)
        return self.und.finish(und, attended[:count]), self.gen.finish(gen, attended[count:])


class MoT(nn.Module):
    """The language model: embedding, layers, a final norm for each expert, scores of next tokens."""

    def __init__(self, config: MoTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MoTLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_gen = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every parameter, in place, on any device (a no-op on meta): normal matrices, zero biases, norms of one; the
        generation expert begins as a copy of the understanding expert."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.init)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        self.copy_to_gen()

    @torch.no_grad()
    def copy_to_gen(self) -> None:
        """Start the generation expert from the understanding expert (BAGEL, Sec. 2.2: from a plain Qwen2.5)."""
        for layer in self.mot_layers():
            for target, source in zip(layer.gen.parameters(), layer.und.parameters(), strict=True):
                target.copy_(source)
        self.norm_gen.weight.copy_(self.norm.weight)

    def mot_layers(self) -> list[MoTLayer]:
        layers = [layer for layer in self.layers if isinstance(layer, MoTLayer)]
        assert len(layers) == len(self.layers)
        return layers

    def forward(self, und: Tensor, gen: Tensor, ids: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """Post-norm states of understanding tokens (U, D) and generation tokens (G, D).

        Args:
            ids: (T,) rotary ids, of the understanding tokens first.
        """
        turn = line_rotation(ids, self.config.head, self.config.rope_theta)
        for number, layer in enumerate(self.layers):
            und, gen = layer(und, gen, turn, attend, number)
        return self.norm(und), self.norm_gen(gen)

    def und_modules(self) -> nn.ModuleList:
        """What understanding uses: embedding, understanding experts, final norm, scores."""
        return nn.ModuleList([self.embed_tokens, *(x.und for x in self.mot_layers()), self.norm, self.lm_head])

    def gen_modules(self) -> nn.ModuleList:
        """What generation adds."""
        return nn.ModuleList([*(x.gen for x in self.mot_layers()), self.norm_gen])
